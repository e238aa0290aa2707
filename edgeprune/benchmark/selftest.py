"""Conformance test of a bundle's engines on the device: `edgeprune selftest`.

The engines and ONNX Runtime on the CPU answer the same questions and are compared step by step. Kernels differ, so values agree
within tolerances. A near tie may change a token; only steps up to the first different token are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from edgeprune.bundle import Bundle
from edgeprune.device.doctor import diagnose
from edgeprune.device.machine import read_machine
from edgeprune.errors import EngineError
from edgeprune.io.progress import SILENT, Progress
from edgeprune.runtime.api.loading import load
from edgeprune.runtime.api.session import Runtime
from edgeprune.runtime.backends.compare import RecordingBackend, differing_indices, largest_difference
from edgeprune.runtime.backends.interface import Backend
from edgeprune.runtime.backends.tensorrt.backend import TensorRTBackend
from edgeprune.tabletop.dataset import frames_for

STAGES = ("reference", "engines", "memory")
TOKENS = 24
PROMPTS = ("What is on the table?", "What else?")  # the second has no image and continues the KV caches of the first
# Relative to the largest magnitude: TF32 and fp16 round at 5e-4, errors accumulate over layers, and near ties in ranks swap.
TOLERANCES = {"vision": 0.02, "logits": 0.03, "kept": 0.05}


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
    """The report: machine, bundle, checks, and times of both backends in milliseconds."""

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
) -> SelfTest:
    """Compare a bundle's engines with ONNX Runtime on the CPU; `open_backend` None: this machine's TensorRT.

    Raises EngineError if the engines cannot be opened.
    """
    progress.begin("reference")
    reference = load(bundle.path, cache_bytes=0)
    expected = RecordingBackend(reference._pipeline.backend, replayable=False)
    expected_answers = _answers(reference, expected)
    progress.begin("engines")
    backend = (open_backend or TensorRTBackend.on_this_device)(bundle)
    try:
        actual = RecordingBackend(backend, replayable=False)
        actual_answers = _answers(reference, actual)
        progress.begin("memory")
        before = backend.device_bytes
        _answers(reference, RecordingBackend(backend, replayable=False))
        checks = [
            *_compare_steps(expected, actual),
            _check_text(expected_answers, actual_answers),
            _check_memory(before, backend.device_bytes),
        ]
        checks.append(_check_limits(reference, backend))
    finally:
        backend.close()
    description = {"model": bundle.manifest.source.model, "target": bundle.manifest.target, "precision": bundle.manifest.precision}
    return SelfTest(
        machine=diagnose(read_machine()).to_dict(),
        bundle={**description, "cuts": [str(cut) for cut in bundle.plan.cuts]},
        checks=tuple(checks),
        times={"onnxruntime cpu": expected_answers.times, "tensorrt": actual_answers.times},
    )


@dataclass
class _Transcript:
    texts: list[str] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)


def _answers(runtime: Runtime, backend: Backend) -> _Transcript:
    pipeline = replace(runtime._pipeline, backend=backend)
    frames = frames_for(pipeline.plan.geometry)
    chat, transcript = Runtime(pipeline).chat(), _Transcript()
    for prompt, images in zip(PROMPTS, (frames, None), strict=True):
        stream = chat.ask(prompt, images, max_tokens=TOKENS)
        transcript.texts.append("".join(stream))
        if images is not None:
            times = stream.receipt.times
            transcript.times = {"vision": times.vision_ms, "prefill": times.prefill_ms, "token": times.ms_per_token}
    return transcript


def _compare_steps(expected: RecordingBackend, actual: RecordingBackend) -> list[Check]:
    same = 0  # steps up to and including the first whose most likely token differs
    logits = [(one.logits, other.logits) for one, other in zip(expected.steps, actual.steps, strict=False)]
    for one, other in logits:
        same += 1
        if one.argmax() != other.argmax():
            break
    kept = list(zip(expected.kept, actual.kept, strict=False))
    indices = sum(one.size for one, _ in kept)
    embeds = [(one.embeds, other.embeds) for one, other in zip(expected.seen, actual.seen, strict=True)]
    return [
        Check("vision", largest_difference(embeds), TOLERANCES["vision"], f"{len(embeds)} image"),
        Check("kept", differing_indices(kept) / max(2 * indices, 1), TOLERANCES["kept"], f"{indices} kept indices"),
        Check("logits", largest_difference(logits[:same]), TOLERANCES["logits"], f"{same} steps before the answers part"),
    ]


def _check_text(one: _Transcript, other: _Transcript) -> Check:
    # Informational, never fails: greedy answers diverge at the first near tie.
    equal = sum(a == b for a, b in zip(one.texts, other.texts, strict=True))
    return Check("text", float(len(one.texts) - equal), float(len(one.texts)), f"{equal} of {len(one.texts)} answers equal")


def _check_memory(before: int, after: int) -> Check:
    return Check("memory", float(after - before), 0.0, f"{after / 1e6:.1f} MB for caches and outputs, as after the first answers")


def _check_limits(runtime: Runtime, backend: Backend) -> Check:
    # Input that is too long must raise an error with a remedy. The model's own context limit is disabled for this.
    pipeline, context = runtime._pipeline, 1 << 30
    decoder, prompts = replace(pipeline.decoder, context=context), replace(pipeline.prompts, context=context)
    unlimited = Runtime(replace(pipeline, backend=backend, decoder=decoder, prompts=prompts))
    try:
        for _ in unlimited.chat().ask("word " * 20_000, max_tokens=1):
            pass
    except EngineError as error:
        return Check("limits", 0.0, 0.0, error.hint)
    return Check("limits", 1.0, 0.0, "a turn of 20000 words was taken")
