"""Measure what a question costs on this machine, pruned beside unpruned: `edgeprune bench`.

Pruned and unpruned answers take turns, and who is first changes every round, so that a machine that warms up slows both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.device.machine import Machine, read_machine
from edgeprune.device.memory import peak_rss, reset_peak_rss
from edgeprune.device.power import EnergyMeter, PowerSource, find_power_source
from edgeprune.errors import UsageError
from edgeprune.runtime.images import read_image
from edgeprune.runtime.receipt import Receipt
from edgeprune.runtime.session import Pictures, Runtime, load
from edgeprune.tabletop.showing import frames_for

WARM_UP = 2  # rounds that are not counted
PROMPT = "What is on the table?"
MODES = {"pruned": True, "unpruned": False}


@dataclass(frozen=True)
class Spread:
    """Median and 95th percentile, interpolated between measurements."""

    p50: float
    p95: float


@dataclass(frozen=True)
class Measured:
    """What an answer costs in one of the two modes; milliseconds are medians over the rounds.

    `ttft_ms`: from a new image to the first token; `repeated_ttft_ms`: to that of a second question about the same image, in the
    same conversation, whose caches are `reused` unless the tokenizer reads the first answer otherwise than it was written.
    `generated` tokens, of which the first comes out of prefill; `peak_rss_bytes` of the process, answering; `energy_j` of one
    answer, None without a sensor; `cuts`: visual tokens before and after each cut.
    """

    preprocess_ms: float
    vision_ms: float
    select_ms: float
    prefill_ms: float
    ttft_ms: Spread
    repeated_ttft_ms: Spread
    reused: bool
    ms_per_token: float
    tokens_per_second: float
    generated: int
    kv_bytes: int
    peak_rss_bytes: int | None
    energy_j: float | None
    cuts: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Benchmark:
    """What was measured, on what, and how. `threads` None: ONNX Runtime's own choice; `power_rails`: what the energy adds up."""

    bundle: str
    machine: Machine
    provider: str
    threads: int | None
    tokens: int
    repeats: int
    warm_up: int
    visual_tokens: int
    power_source: str | None
    power_rails: tuple[str, ...]
    pruned: Measured
    unpruned: Measured

    @property
    def ratios(self) -> dict[str, float]:
        """What pruning leaves of each cost: pruned divided by unpruned, where both were measured."""
        pairs = ((name, _number(self.pruned, name), _number(self.unpruned, name)) for name in _COSTS)
        return {name: left / whole for name, left, whole in pairs if left is not None and whole}

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as JSON data."""
        plain = ("bundle", "provider", "threads", "tokens", "repeats", "warm_up", "visual_tokens", "power_source", "power_rails")
        data = {name: getattr(self, name) for name in plain}
        results = {"pruned": asdict(self.pruned), "unpruned": asdict(self.unpruned), "ratios": self.ratios}
        return {"machine": self.machine.to_dict(), **data, **results}


_COSTS = (
    "preprocess_ms",
    "vision_ms",
    "select_ms",
    "prefill_ms",
    "ttft_ms",
    "repeated_ttft_ms",
    "ms_per_token",
    "tokens_per_second",
    "kv_bytes",
    "peak_rss_bytes",
    "energy_j",
)


def benchmark(
    path: Path,
    *,
    image: Path | None = None,
    prompt: str | None = None,
    tokens: int = 32,
    repeats: int = 10,
    threads: int | None = None,
    provider: str = "cpu",
    fit: str = "exact",
    machine: Machine | None = None,
    power: PowerSource | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Benchmark:
    """Return what answers of exactly `tokens` tokens cost, over `repeats` rounds after a warm-up.

    The model's end token does not end an answer here, so that both modes generate as much. `image` None: a TableTop scene of the
    bundle's own size. `machine` and `power` None: those of this machine; a power source that is given stays open. Raises
    UsageError, ImageError and BundleError.
    """
    if tokens < 2 or repeats < 1:
        raise UsageError(
            f"Cannot measure {tokens} tokens in {repeats} rounds.", hint="Ask for 2 tokens or more, and for 1 round or more."
        )
    runtime = load(path, threads=threads, provider=provider)
    shown: Pictures = frames_for(runtime.plan.geometry) if image is None else read_image(image)
    facts = machine or read_machine()
    source = power or find_power_source()
    try:
        bench = _Bench(runtime, shown, PROMPT if prompt is None else prompt, tokens, fit, source)
        peaks = bench.warm_up()
        for done in range(repeats):
            bench.round(done)
            progress(done + 1)
        reading = source.read() if source is not None else None
    finally:
        if source is not None and power is None:
            source.close()
    return Benchmark(
        bundle=str(path),
        machine=facts,
        provider=provider,
        threads=threads,
        tokens=tokens,
        repeats=repeats,
        warm_up=WARM_UP,
        visual_tokens=runtime.plan.geometry.tokens,
        power_source=source.name if source is not None else None,
        power_rails=reading.rails if reading is not None else (),
        pruned=_summary(bench.taken["pruned"], peaks["pruned"]),
        unpruned=_summary(bench.taken["unpruned"], peaks["unpruned"]),
    )


@dataclass
class _Taken:
    # The answers of one mode.
    first: list[Receipt] = field(default_factory=list)
    second: list[Receipt] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)


class _Bench:
    def __init__(self, runtime: Runtime, image: Pictures, prompt: str, tokens: int, fit: str, power: PowerSource | None) -> None:
        self._runtime, self._image, self._prompt, self._tokens, self._fit = runtime, image, prompt, tokens, fit
        self._endless = Runtime(replace(runtime._model, end_tokens=()))
        self._meter = EnergyMeter(power)
        self.taken = {mode: _Taken() for mode in MODES}

    def warm_up(self) -> dict[str, int | None]:
        """Run the rounds that do not count; return the peak memory of each mode.

        Pruned first: ONNX Runtime keeps what it once allocated.
        """
        peaks = {}
        reset_peak_rss()  # what loading took is not what answering takes
        for mode in MODES:
            for _ in range(WARM_UP):
                self._measure(mode, _Taken())
            peaks[mode] = peak_rss()
        return peaks

    def round(self, number: int) -> None:
        """Measure an answer in both modes."""
        for mode in list(MODES)[:: -1 if number % 2 else 1]:
            self._measure(mode, self.taken[mode])

    def _measure(self, mode: str, taken: _Taken) -> None:
        prune = MODES[mode]
        with self._meter:
            answer = self._endless.generate(self._image, self._prompt, prune=prune, fit=self._fit, max_tokens=self._tokens)
        if self._meter.joules is not None:
            taken.joules.append(self._meter.joules)
        taken.first.append(answer.receipt)
        # Of one token, so that the conversation most likely reads it as it wrote it and keeps its caches.
        chat = self._runtime.chat(prune=prune, fit=self._fit)
        "".join(chat.ask(self._prompt, self._image, max_tokens=1))
        again = chat.ask(self._prompt, max_tokens=1)
        "".join(again)
        taken.second.append(again.receipt)


def _summary(taken: _Taken, peak: int | None) -> Measured:
    times = [receipt.times for receipt in taken.first]
    steps = [step for each in times for step in each.decode_ms]
    cuts = taken.first[-1].cuts
    return Measured(
        preprocess_ms=_median([each.preprocess_ms for each in times]),
        vision_ms=_median([each.vision_ms for each in times]),
        select_ms=_median([each.select_ms for each in times]),
        prefill_ms=_median([each.prefill_ms for each in times]),
        ttft_ms=_spread([each.ttft_ms for each in times]),
        repeated_ttft_ms=_spread([receipt.times.ttft_ms for receipt in taken.second]),
        reused=all(receipt.visual_tokens == 0 for receipt in taken.second),
        ms_per_token=_median(steps),
        tokens_per_second=1e3 * len(steps) / sum(steps),
        generated=min(receipt.generated_tokens for receipt in taken.first),
        kv_bytes=taken.first[-1].kv_bytes,
        peak_rss_bytes=peak,
        energy_j=_median(taken.joules) if taken.joules else None,
        cuts=tuple((cut.cut, cut.before, cut.after) for cut in cuts),
    )


def _number(measured: Measured, name: str) -> float | None:
    value = getattr(measured, name)
    return value.p50 if isinstance(value, Spread) else value


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _spread(values: Sequence[float]) -> Spread:
    return Spread(float(np.percentile(values, 50)), float(np.percentile(values, 95)))
