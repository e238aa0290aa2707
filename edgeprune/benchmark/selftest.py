"""The conformance of a bundle's engines on the device: `edgeprune selftest`, whose report can be sent back.

The engines answer the same questions as ONNX Runtime on the CPU, step by step. Kernels differ, so numbers agree within a tolerance;
a near tie may change a word, after which only what came before is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from edgeprune.bundle import Bundle
from edgeprune.device.doctor import diagnose
from edgeprune.device.machine import read_machine
from edgeprune.errors import EngineError
from edgeprune.runtime.api.loading import load
from edgeprune.runtime.api.session import Runtime
from edgeprune.runtime.backends.interface import Engine, Interrupt, Seen, Step, StepInput
from edgeprune.runtime.backends.kv_cache import KvCache
from edgeprune.runtime.backends.tensorrt.backend import TensorRTEngine
from edgeprune.tabletop.dataset import frames_for

TOKENS = 24
PROMPTS = ("What is on the table?", "What else?")  # the second without an image, on the caches of the first
# Relative to the largest magnitude: TF32 and fp16 round at 5e-4, and layers add up. Ranks that are nearly equal change places.
TOLERANCES = {"vision": 0.02, "logits": 0.03, "kept": 0.05}


@dataclass(frozen=True)
class Check:
    """One thing that was compared: the worst difference found, what is allowed, and in words."""

    name: str
    worst: float
    allowed: float
    words: str

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed."""
        return self.worst <= self.allowed


@dataclass(frozen=True)
class SelfTest:
    """The report: machine, bundle, checks, and the medians of both ways to compute (milliseconds)."""

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
    open_engine: Callable[[Bundle], TensorRTEngine] | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> SelfTest:
    """Compare a bundle's engines, as `open_engine` or this machine's GPU has them, with ONNX Runtime on the CPU.

    Raises EngineError when they cannot be opened.
    """
    progress("reference")
    reference = load(bundle.path, cache_bytes=0)
    expected = _Listener(reference._model.engine)
    said = _answers(reference, expected)
    progress("engines")
    engine = (open_engine or TensorRTEngine.here)(bundle)
    try:
        actual = _Listener(engine)
        repeated = _answers(reference, actual)
        progress("memory")
        before = engine.device_bytes
        _answers(reference, _Listener(engine))
        checks = [*_compared(expected, actual), _words(said, repeated), _grown(before, engine.device_bytes)]
        checks.append(_refused(reference, engine))
    finally:
        engine.close()
    about = {"model": bundle.manifest.source.model, "target": bundle.manifest.target, "precision": bundle.manifest.precision}
    return SelfTest(
        machine=diagnose(read_machine()).to_dict(),
        bundle={**about, "cuts": [str(cut) for cut in bundle.plan.cuts]},
        checks=tuple(checks),
        times={"onnxruntime cpu": said.times, "tensorrt": repeated.times},
    )


@dataclass
class _Said:
    texts: list[str] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)


class _Listener:
    # An engine that keeps what another one returned, of what can be compared.
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.seen: list[np.ndarray] = []
        self.kept: list[np.ndarray] = []
        self.logits: list[np.ndarray] = []

    def see(self, patches: np.ndarray, *, whole: bool = False, interrupt: Interrupt | None = None) -> Seen:
        seen = self._engine.see(patches, whole=whole, interrupt=interrupt)
        self.seen.append(_on_host(seen.embeds))
        self.kept += seen.kept
        return seen

    def select(self, seen: Seen, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, np.ndarray]:
        embeds, kept = self._engine.select(seen, prompt, tier)
        self.kept.append(kept)
        return embeds, kept

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        return self._engine.embed(ids)

    def step(self, tokens: StepInput, cache: KvCache) -> Step:
        step = self._engine.step(tokens, cache)
        self.logits.append(step.logits)
        self.kept += step.kept if len(tokens.order) else ()
        return step

    def rate(self, split: np.ndarray, step: int) -> float:
        return self._engine.rate(split, step)


def _answers(runtime: Runtime, engine: Engine) -> _Said:
    model = replace(runtime._model, engine=engine)
    frames = frames_for(model.plan.geometry)
    chat, said = Runtime(model).chat(), _Said()
    for prompt, shown in zip(PROMPTS, (frames, None), strict=True):
        stream = chat.ask(prompt, shown, max_tokens=TOKENS)
        said.texts.append("".join(stream))
        if shown is not None:
            times = stream.receipt.times
            said.times = {"vision": times.vision_ms, "prefill": times.prefill_ms, "token": times.ms_per_token}
    return said


def _compared(expected: _Listener, actual: _Listener) -> list[Check]:
    same = 0  # steps before the first whose likeliest token differs, and that one
    for one, other in zip(expected.logits, actual.logits, strict=False):
        same += 1
        if one.argmax() != other.argmax():
            break
    logits = list(zip(expected.logits[:same], actual.logits[:same], strict=True))
    kept = list(zip(expected.kept, actual.kept, strict=False))
    different = sum(len(np.setxor1d(*rows)) for pair in kept for rows in zip(*map(np.atleast_2d, pair), strict=True))
    share = different / max(2 * sum(one.size for one, _ in kept), 1)
    return [
        _numbers("vision", list(zip(expected.seen, actual.seen, strict=True)), f"{len(expected.seen)} image"),
        Check("kept", share, TOLERANCES["kept"], f"{sum(one.size for one, _ in kept)} kept indices"),
        _numbers("logits", logits, f"{same} steps before the answers part"),
    ]


def _numbers(name: str, pairs: list[tuple[np.ndarray, np.ndarray]], words: str) -> Check:
    worst = 0.0
    for one, other in pairs:
        alike = one.shape == other.shape and bool(np.isfinite(other).all())
        worst = max(worst, float(np.abs(one - other).max() / max(np.abs(one).max(), 1e-6)) if alike else float("inf"))
    return Check(name, worst, TOLERANCES[name], words)


def _words(one: _Said, other: _Said) -> Check:
    # Told, not judged: greedy answers part at the first near tie.
    equal = sum(a == b for a, b in zip(one.texts, other.texts, strict=True))
    return Check("text", float(len(one.texts) - equal), float(len(one.texts)), f"{equal} of {len(one.texts)} answers equal")


def _grown(before: int, after: int) -> Check:
    return Check("memory", float(after - before), 0.0, f"{after / 1e6:.1f} MB for caches and outputs, as after the first answers")


def _refused(runtime: Runtime, engine: Engine) -> Check:
    # What is too long has to be an error that names its remedy, and the engine has to work on. The model's own limit stands aside.
    unlimited = replace(runtime._model.decoder, context=1 << 30)
    try:
        for _ in Runtime(replace(runtime._model, engine=engine, decoder=unlimited)).chat().ask("word " * 20_000, max_tokens=1):
            pass
    except EngineError as error:
        return Check("limits", 0.0, 0.0, error.hint)
    return Check("limits", 1.0, 0.0, "a turn of 20000 words was taken")


def _on_host(array: Any) -> np.ndarray:
    copied: np.ndarray = array.numpy() if hasattr(array, "numpy") else array
    return copied
