"""Measure what a question costs on this machine, beside what it costs otherwise: `edgeprune bench`.

Every round asks each contender once, forwards and backwards in turns, so that a machine that warms up slows all alike; what a
contender costs beside the baseline is the median of the rounds' own ratios. Defined in full: docs/benchmark.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeprune.benchmark.profile import measure_peaks
from edgeprune.benchmark.results import (
    ContextPoint,
    RoundCosts,
    Startup,
    VariantResult,
    decode_kv_bytes,
    ratios,
    row_of,
    sizes_of,
    spreads,
    with_roofline,
)
from edgeprune.benchmark.startup import measure_startup
from edgeprune.benchmark.sweeps import KeptPoint, LinearFit, line_through, sweep_contexts, sweep_kept_tokens
from edgeprune.benchmark.variants import (
    BUILTIN,
    PROMPT,
    PRUNED,
    UNPRUNED,
    BenchmarkPrompt,
    Variant,
    equal_work_tokens,
    load_variants,
)
from edgeprune.bundle import Manifest
from edgeprune.device.machine import Machine, read_machine
from edgeprune.device.power import EnergyCounter, PowerSource, find_power_source
from edgeprune.device.profile import reported_peaks
from edgeprune.device.roofline import Peaks
from edgeprune.errors import UsageError
from edgeprune.runtime.backends.providers import TENSORRT
from edgeprune.runtime.telemetry.receipt import Receipt

WARM_UP = 2  # rounds that are not counted


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is measured.

    `compare`: see `load_variants`; the first is the baseline, or the bundle itself where there is none. `contexts`: text tokens of
    questions after which decode steps are timed; `kept`: visual tokens with which the first token is. `image` None: a TableTop
    scene of each bundle's own size. `threads` None: ONNX Runtime's own choice.
    """

    bundle: Path
    compare: tuple[str, ...]
    contexts: tuple[int, ...]
    kept: tuple[int, ...]
    image: Path | None
    question: BenchmarkPrompt
    repeats: int
    threads: int | None
    provider: str

    def __post_init__(self) -> None:
        tokens, repeats = self.question.tokens, self.repeats
        if tokens < 2 or repeats < 1:
            raise UsageError(
                f"Cannot measure {tokens} tokens in {repeats} rounds.", hint="Ask for 2 tokens or more, and for 1 round or more."
            )
        if self.kept and self.provider == TENSORRT:
            raise UsageError(
                "Growth cannot be measured on TensorRT engines, whose visual tokens stay on the device.", hint="Leave out --kept."
            )

    @property
    def baseline(self) -> str:
        """The name of what ratios are to."""
        return self.compare[0] if self.compare else PRUNED


@dataclass(frozen=True)
class Benchmark:
    """What was measured, and on what. `power_rails`: what the energy adds up. `growth` of the first token with visual tokens.

    `equal_work_tokens`: how many of the `visual_tokens` "random" and "uniform" enter; `peaks` None where nobody knows them, and
    `peaks_from`: "measured", or the report that they were read from. The bundle's own figures are the first of `variants`.
    """

    request: BenchmarkOptions
    machine: Machine
    visual_tokens: int
    equal_work_tokens: int
    power_source: str | None
    power_rails: tuple[str, ...]
    peaks: Peaks | None
    peaks_from: str
    variants: tuple[VariantResult, ...]
    growth: tuple[KeptPoint, ...] = ()

    @property
    def line(self) -> LinearFit | None:
        """The line through the prefills of `growth`."""
        return line_through(self.growth)

    def of(self, name: str) -> VariantResult:
        """Return the figures of a contender; raise KeyError when it was not measured."""
        return {figures.name: figures for figures in self.variants}[name]

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as JSON data, the contenders by name."""
        asked = asdict(self.request)
        asked |= {
            **asked.pop("question"),
            "bundle": str(self.request.bundle),
            "baseline": self.request.baseline,
            "warm_up": WARM_UP,
        }
        asked["image"] = None if self.request.image is None else str(self.request.image)
        names = ("visual_tokens", "equal_work_tokens", "power_source", "power_rails", "peaks_from")
        found = {name: getattr(self, name) for name in names}
        peaks = None if self.peaks is None else asdict(self.peaks)
        compared = {figures.name: {**asdict(figures), "rss_ratio": figures.rss_ratio} for figures in self.variants}
        growth = {"growth": [asdict(at) for at in self.growth], "line": None if self.line is None else asdict(self.line)}
        return {"machine": self.machine.to_dict(), **asked, **found, "peaks": peaks, "contenders": compared, **growth}


def benchmark(
    path: Path,
    *,
    compare: Sequence[str] = (UNPRUNED,),
    contexts: Sequence[int] = (),
    kept: Sequence[int] = (),
    device_report: Path | None = None,
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
    startup: Callable[..., Startup] = measure_startup,
) -> Benchmark:
    """Return what answers of exactly `tokens` tokens cost, over `repeats` rounds after a warm-up; see BenchmarkOptions for the
    rest.

    The model's end token does not end an answer here, so that all generate as much. `device_report`: DeviceProfile whose peaks are
    used instead of measuring them. `machine` and `power` None: those of this machine; a power source that is given stays open.
    Raises UsageError, ImageError, BundleError and EngineError.
    """
    question = BenchmarkPrompt(PROMPT if prompt is None else prompt, tokens, fit)
    request = BenchmarkOptions(path, tuple(compare), tuple(contexts), tuple(kept), image, question, repeats, threads, provider)
    peaks = None if device_report is None else reported_peaks(device_report)
    with _powered(power) as source, closing(EnergyCounter(source)) as counter:
        bench = Measurement(request, counter)
        at = sweep_contexts(bench.compared, question, contexts, repeats)
        growth = sweep_kept_tokens(bench.compared[0], question, kept, repeats)
        bench.run(progress)
        reading = source.read() if source is not None else None
    if peaks is None and provider == "cpu":
        peaks = measure_peaks(threads)
    return Benchmark(
        request=request,
        machine=machine or read_machine(),
        visual_tokens=bench.plan.geometry.tokens,
        equal_work_tokens=equal_work_tokens(bench.plan),
        power_source=source.name if source is not None else None,
        power_rails=reading.rails if reading is not None else (),
        peaks=peaks,
        peaks_from="measured" if device_report is None else str(device_report),
        variants=_started(bench.figures(at, peaks), bench.release_models(), request, startup),
        growth=growth,
    )


@contextmanager
def _powered(given: PowerSource | None) -> Iterator[PowerSource | None]:
    source = given or find_power_source()
    try:
        yield source
    finally:
        if source is not None and given is None:
            source.close()


@dataclass
class RoundSamples:
    """What the rounds of one contender gave: a row of costs each, and of the last one the answer's receipt."""

    rows: list[RoundCosts] = field(default_factory=list)
    receipt: Receipt | None = None
    reused: bool = True


class Measurement:
    """The contenders of a request, loaded, and what was measured of them."""

    def __init__(self, request: BenchmarkOptions, counter: EnergyCounter) -> None:
        self._request, self._counter = request, counter
        self.compared = load_variants(
            request.bundle, request.compare, request.image, threads=request.threads, provider=request.provider
        )
        self.plan = self.compared[0].runtime.plan
        self._taken = {each.name: RoundSamples() for each in self.compared}

    def run(self, progress: Callable[[int], None]) -> None:
        """Ask in turns, after rounds that do not count."""
        for number in range(-WARM_UP, self._request.repeats):
            for each in self.compared[:: -1 if number % 2 else 1]:
                self._measure(each, self._taken[each.name] if number >= 0 else RoundSamples())
            if number >= 0:
                progress(number + 1)

    def figures(self, at: Mapping[str, tuple[ContextPoint, ...]], peaks: Peaks | None) -> list[VariantResult]:
        """Return the figures of all; with the roofline where there are peaks."""
        sizes = {each.path: sizes_of(each.path) for each in self.compared} if peaks else {}
        found = [self._figures(each, at[each.name]) for each in self.compared]
        if peaks is None:
            return found
        return [with_roofline(one, each, sizes[each.path], peaks) for one, each in zip(found, self.compared, strict=True)]

    def release_models(self) -> list[tuple[Path, str]]:
        """Let go of all weights, so that they are not held twice while other processes start; return paths and what of them ran."""
        kinds = [(each.path, each.name if each.name in BUILTIN else PRUNED) for each in self.compared]
        self.compared.clear()
        return kinds

    def _measure(self, asked: Variant, taken: RoundSamples) -> None:
        question, asked = self._request.question, asked.with_empty_cache
        with self._counter.measure() as energy:
            taken.receipt = question.answer(asked)
        recalled, second = question.ask_twice(asked)
        taken.reused = taken.reused and second.visual_tokens == 0
        taken.rows.append(row_of(taken.receipt, recalled, second, energy.joules))

    def _figures(self, each: Variant, at: tuple[ContextPoint, ...]) -> VariantResult:
        taken, baseline = self._taken[each.name], self._taken[self._request.baseline]
        receipt = taken.receipt
        assert receipt is not None
        files = Manifest.load(each.path).files
        return VariantResult(
            name=each.name,
            costs=spreads(taken.rows),
            ratios=ratios(taken.rows, baseline.rows),
            generated=receipt.generated_tokens,
            text_tokens=receipt.text_tokens,
            visual_tokens=sum(each.alive) / len(each.alive),
            reused=taken.reused,
            cuts=tuple((cut.cut, cut.before, cut.after) for cut in receipt.cuts),
            weight_bytes=sum(record.bytes for name, record in files.items() if name.startswith("onnx/")),
            decode_kv_bytes=decode_kv_bytes(receipt, each.runtime._pipeline.kv_bytes_per_token_layer),
            contexts=at,
        )


def _started(
    found: Sequence[VariantResult], kinds: Sequence[tuple[Path, str]], request: BenchmarkOptions, startup: Callable[..., Startup]
) -> tuple[VariantResult, ...]:
    threads, provider = request.threads, request.provider
    starts = [startup(path, kind, request.question, request.image, threads=threads, provider=provider) for path, kind in kinds]
    return tuple(replace(each, startup=start) for each, start in zip(found, starts, strict=True))
