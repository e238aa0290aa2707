"""Conformance test of a bundle's engines on the device: `edgeprune selftest`.

The engines repeat the conversation that `export` held on the host (`edgeprune.benchmark.expected`), and every output is compared
with the stored one. Kernels differ, so values agree within tolerances. Beside the engines there is no second model in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgeprune.benchmark.expected import ComparingBackend, Expected, converse, read_expected
from edgeprune.bundle import Bundle
from edgeprune.bundle.signing import TrustedKeys
from edgeprune.device.doctor import diagnose
from edgeprune.device.machine import read_machine
from edgeprune.errors import EngineError
from edgeprune.io.progress import SILENT, Progress
from edgeprune.runtime.api.loading import runtime_on
from edgeprune.runtime.api.session import Runtime
from edgeprune.runtime.backends.tensorrt.backend import TensorRTBackend

STAGES = ("engines", "outputs", "memory")
# Relative to the largest magnitude: TF32 and fp16 round at 5e-4, errors accumulate over layers, and near ties in ranks swap.
TOLERANCES = {"vision": 0.02, "logits": 0.03, "kept": 0.05, "ratio": 0.02}
# bfloat16 rounds at 4e-3: one digit more or less is 0.8 % of a logit.
# Roundings to 8 bits fall differently after a few layers (edgeprune/export/verification.py).
COARSE_TOLERANCES = {"vision": 0.06, "logits": 0.1, "kept": 0.1, "ratio": 0.06}
_BY_PRECISION = {**dict.fromkeys(("bf16", "w8a8", "fp8"), COARSE_TOLERANCES), "nvfp4": {**COARSE_TOLERANCES, "logits": 0.2}}


@dataclass(frozen=True)
class Check:
    """One comparison: the worst difference, the allowed difference, and a description (`words`)."""

    name: str
    worst: float
    allowed: float
    words: str

    @property
    def passed(self) -> bool:
        """Whether the worst difference is allowed."""
        return self.worst <= self.allowed


@dataclass(frozen=True)
class SelfTest:
    """The report: machine, bundle, checks, and times of the first answer in milliseconds."""

    machine: dict[str, Any]
    bundle: dict[str, Any]
    checks: tuple[Check, ...]
    times: dict[str, dict[str, float]]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return {"passed": self.passed, **asdict(self)}


def selftest(
    bundle: Bundle,
    open_backend: Callable[[Bundle], TensorRTBackend] | None = None,
    progress: Progress = SILENT,
    *,
    trust: TrustedKeys = (),
) -> SelfTest:
    """Compare a bundle's engines with its expected outputs; `open_backend` None: this machine's TensorRT, with `trust` as in
    `edgeprune.runtime.load`.

    Raises BundleError if the bundle has no expected outputs, and EngineError if the engines cannot be opened.
    """
    expected = read_expected(bundle)
    progress.begin("engines")
    backend = TensorRTBackend.on_this_device(bundle, trust) if open_backend is None else open_backend(bundle)
    try:
        progress.begin("outputs")
        compared, times = _compare(bundle, backend, expected)
        progress.begin("memory")
        before = backend.device_bytes
        _compare(bundle, backend, expected)
        checks = [*_checks(compared, expected, bundle.manifest.precision), _check_memory(before, backend.device_bytes)]
        checks.append(_check_limits(runtime_on(bundle, backend)))
        # Informational: steps by hand are right, and slower.
        why = backend.why_by_hand
        checks.append(Check("steps", 0.0, 0.0, f"launched by hand: {why}" if why else "one launch of a CUDA graph each"))
    finally:
        backend.close()
    description = {"model": bundle.manifest.source.model, "target": bundle.manifest.target, "precision": bundle.manifest.precision}
    return SelfTest(
        machine=diagnose(read_machine()).to_dict(),
        bundle={**description, "cuts": [str(cut) for cut in bundle.plan.cuts]},
        checks=tuple(checks),
        times={"tensorrt": times},
    )


def _compare(bundle: Bundle, backend: TensorRTBackend, expected: Expected) -> tuple[ComparingBackend, dict[str, float]]:
    compared = ComparingBackend(backend, expected)
    times = converse(runtime_on(bundle, compared), expected.prompts, expected.frames)
    return compared, {"vision": times.vision_ms, "prefill": times.prefill_ms, "token": times.ms_per_token}


def _checks(compared: ComparingBackend, expected: Expected, precision: str) -> list[Check]:
    allowed = _BY_PRECISION.get(precision, TOLERANCES)
    steps, done = compared.steps, len(compared.logits)
    worst = max(compared.logits, default=float("inf")) if done == steps else float("inf")
    where = f", the worst in step {compared.logits.index(worst) + 1}" if worst in compared.logits else ""
    kept = compared.moved / max(2 * compared.kept, 1)
    ratios = len(expected.arrays.get("ratios", ()))
    return [
        Check("vision", compared.vision, allowed["vision"], f"{expected.arrays['embeds'].shape[1]} visual tokens"),
        Check("kept", kept, allowed["kept"], f"{compared.kept} kept indices"),
        Check("logits", worst, allowed["logits"], f"{done} of {steps} steps{where}"),
        *([Check("ratio", compared.ratio, allowed["ratio"], f"{ratios} keep ratios")] if ratios else []),
        # Informational, never fails: kernels choose differently between tokens that are nearly as probable.
        Check("tokens", float(steps - compared.equal), float(steps), f"{compared.equal} of {steps} most probable tokens equal"),
    ]


def _check_memory(before: int, after: int) -> Check:
    return Check(
        "memory", float(after - before), 0.0, f"{after / 1e6:.1f} MB for caches, outputs and scratch, as after the first answers"
    )


def _check_limits(runtime: Runtime) -> Check:
    # Input that is too long must raise an error with a remedy. The model's own context limit is disabled for this.
    pipeline, context = runtime._pipeline, 1 << 30
    decoder, prompts = replace(pipeline.decoder, context=context), replace(pipeline.prompts, context=context)
    unlimited = Runtime(replace(pipeline, decoder=decoder, prompts=prompts))
    try:
        for _ in unlimited.chat().ask("word " * 20_000, max_tokens=1):
            pass
    except EngineError as error:
        return Check("limits", 0.0, 0.0, error.hint)
    return Check("limits", 1.0, 0.0, "a turn of 20000 words was taken")
