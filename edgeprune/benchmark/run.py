"""Benchmark the variants of a bundle on this machine: `edgeprune bench`.

Every round asks each variant once, alternating forward and reverse order, so that thermal slowdown affects all equally. The ratio
of a variant to the baseline is the median of the ratios of each round. docs/benchmark.md has the complete definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeprune.benchmark.profile import measure_peaks, step_nodes
from edgeprune.benchmark.results import (
    ContextPoint,
    RoundCosts,
    Startup,
    VariantResult,
    bundle_at,
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
from edgeprune.bundle.signing import TrustedKeys
from edgeprune.device.machine import Machine, read_machine
from edgeprune.device.power import EnergyCounter, PowerSource, find_power_source
from edgeprune.device.profile import reported_peaks
from edgeprune.device.roofline import Peaks
from edgeprune.errors import UsageError
from edgeprune.io.progress import SILENT, Progress
from edgeprune.runtime.backends.providers import TENSORRT
from edgeprune.runtime.telemetry.receipt import Receipt

WARM_UP = 2  # rounds that are not counted


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of a benchmark.

    `compare`: see `load_variants`; its first entry is the baseline, or the bundle itself if it is empty. `contexts`: text tokens of
    the questions after which decode steps are timed. `kept`: numbers of visual tokens for which TTFT is timed. `image` None: a
    TableTop scene of each bundle's image size. `threads` None: ONNX Runtime's default. `trust`: as in `edgeprune.runtime.load`.
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
    trust: TrustedKeys = ()

    def __post_init__(self) -> None:
        tokens, repeats = self.question.tokens, self.repeats
        if tokens < 2 or repeats < 1:
            raise UsageError(
                f"Cannot measure {tokens} tokens in {repeats} rounds.", hint="Ask for 2 tokens or more, and for 1 round or more."
            )
        if self.kept and self.provider == TENSORRT:
            raise UsageError(
                "Growth cannot be measured on TensorRT engines, whose visual tokens stay on the device.",
                hint="Leave out --visual-tokens.",
            )

    @property
    def baseline(self) -> str:
        """Name of the variant that ratios refer to."""
        return self.compare[0] if self.compare else PRUNED


@dataclass(frozen=True)
class Benchmark:
    """Results of a benchmark and facts of the machine. The first of `variants` is the bundle itself.

    `equal_work_tokens`: how many of the `visual_tokens` the variants "random" and "uniform" keep. `power_rails`: summed for energy.
    `peaks`: None if unknown; `peaks_from`: "measured", or the path of a device profile. `growth`: TTFT by visual tokens.
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
        """The line fitted to the prefill times of `growth`."""
        return line_through(self.growth)

    def of(self, name: str) -> VariantResult:
        """Return the result of a variant; raise KeyError if it was not measured."""
        return {figures.name: figures for figures in self.variants}[name]

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON data, variants by name."""
        options = asdict(self.request)
        options |= {
            **options.pop("question"),
            "bundle": str(self.request.bundle),
            "baseline": self.request.baseline,
            "warm_up": WARM_UP,
        }
        options["image"] = None if self.request.image is None else str(self.request.image)
        names = ("visual_tokens", "equal_work_tokens", "power_source", "power_rails", "peaks_from")
        results = {name: getattr(self, name) for name in names}
        peaks = None if self.peaks is None else asdict(self.peaks)
        compared = {figures.name: {**asdict(figures), "rss_ratio": figures.rss_ratio} for figures in self.variants}
        growth = {"growth": [asdict(point) for point in self.growth], "line": None if self.line is None else asdict(self.line)}
        return {"machine": self.machine.to_dict(), **options, **results, "peaks": peaks, "contenders": compared, **growth}


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
    trust: TrustedKeys = (),
    fit: str = "exact",
    machine: Machine | None = None,
    power: PowerSource | None = None,
    progress: Progress = SILENT,
    startup: Callable[..., Startup] = measure_startup,
) -> Benchmark:
    """Measure answers of exactly `tokens` tokens over `repeats` rounds after a warm-up. See BenchmarkOptions for other parameters.

    End tokens do not end an answer, so that all variants generate the same number. `device_report`: a DeviceProfile whose peaks are
    used instead of measuring them. `machine` and `power` None: those of this machine; a given power source stays open. Raises
    UsageError, ImageError, BundleError and EngineError.
    """
    question = BenchmarkPrompt(PROMPT if prompt is None else prompt, tokens, fit)
    request = BenchmarkOptions(
        path, tuple(compare), tuple(contexts), tuple(kept), image, question, repeats, threads, provider, tuple(trust)
    )
    peaks = None if device_report is None else reported_peaks(device_report)
    with _open_power_source(power) as source, closing(EnergyCounter(source)) as counter:
        progress.say("loading the models")
        bench = Measurement(request, counter)
        context_points = sweep_contexts(bench.compared, question, contexts, repeats, progress)
        growth = sweep_kept_tokens(bench.compared[0], question, kept, repeats, progress)
        bench.run(progress.count("rounds", repeats))
        reading = source.read() if source is not None else None
    if peaks is None and provider == "cpu":
        progress.say("peaks of the processor")
        peaks = measure_peaks(threads)
    results, kinds = bench.figures(context_points, peaks), bench.release_models()
    progress.say("nodes of a decode step")
    nodes = {path: step_nodes(bundle_at(path), provider, threads) for path in dict(kinds)}
    results = [replace(one, step_nodes=nodes[path]) for one, (path, _) in zip(results, kinds, strict=True)]
    return Benchmark(
        request=request,
        machine=machine or read_machine(),
        visual_tokens=bench.plan.geometry.tokens,
        equal_work_tokens=equal_work_tokens(bench.plan),
        power_source=source.name if source is not None else None,
        power_rails=reading.rails if reading is not None else (),
        peaks=peaks,
        peaks_from="measured" if device_report is None else str(device_report),
        variants=_with_startup(results, kinds, request, startup, progress),
        growth=growth,
    )


@contextmanager
def _open_power_source(given: PowerSource | None) -> Iterator[PowerSource | None]:
    source = given or find_power_source()
    try:
        yield source
    finally:
        if source is not None and given is None:
            source.close()


@dataclass
class RoundSamples:
    """Samples of one variant: the costs of each round, and the receipt of the last answer."""

    rows: list[RoundCosts] = field(default_factory=list)
    receipt: Receipt | None = None
    reused: bool = True


class Measurement:
    """The loaded variants of a request and their samples."""

    def __init__(self, request: BenchmarkOptions, counter: EnergyCounter) -> None:
        self._request, self._counter = request, counter
        self.compared = load_variants(
            request.bundle,
            request.compare,
            request.image,
            threads=request.threads,
            provider=request.provider,
            trust=request.trust,
        )
        self.plan = self.compared[0].runtime.plan
        self._samples = {variant.name: RoundSamples() for variant in self.compared}

    def run(self, progress: Callable[[int], None]) -> None:
        """Run the warm-up and all counted rounds."""
        for number in range(-WARM_UP, self._request.repeats):
            for variant in self.compared[:: -1 if number % 2 else 1]:
                self._measure(variant, self._samples[variant.name] if number >= 0 else RoundSamples())
            if number >= 0:
                progress(number + 1)

    def figures(self, at: Mapping[str, tuple[ContextPoint, ...]], peaks: Peaks | None) -> list[VariantResult]:
        """Return the results of all variants, with rooflines if peaks are given."""
        sizes = {variant.path: sizes_of(variant.path) for variant in self.compared} if peaks else {}
        results = [self._figures(variant, at[variant.name]) for variant in self.compared]
        if peaks is None:
            return results
        return [
            with_roofline(one, variant, sizes[variant.path], peaks) for one, variant in zip(results, self.compared, strict=True)
        ]

    def release_models(self) -> list[tuple[Path, str]]:
        """Unload all variants, so that weights are not in memory twice during startup runs; return their paths and kinds."""
        kinds = [(variant.path, variant.name if variant.name in BUILTIN else PRUNED) for variant in self.compared]
        self.compared.clear()
        return kinds

    def _measure(self, variant: Variant, samples: RoundSamples) -> None:
        question, variant = self._request.question, variant.with_empty_cache
        with self._counter.measure() as energy:
            samples.receipt = question.answer(variant)
        recalled, second = question.ask_twice(variant)
        samples.reused = samples.reused and second.visual_tokens == 0
        samples.rows.append(row_of(samples.receipt, recalled, second, energy.joules))

    def _figures(self, variant: Variant, contexts: tuple[ContextPoint, ...]) -> VariantResult:
        samples, baseline = self._samples[variant.name], self._samples[self._request.baseline]
        receipt = samples.receipt
        assert receipt is not None
        files = Manifest.load(variant.path).files
        return VariantResult(
            name=variant.name,
            costs=spreads(samples.rows),
            ratios=ratios(samples.rows, baseline.rows),
            generated=receipt.generated_tokens,
            text_tokens=receipt.text_tokens,
            visual_tokens=sum(variant.alive) / len(variant.alive),
            reused=samples.reused,
            cuts=tuple((cut.cut, cut.before, cut.after) for cut in receipt.cuts),
            weight_bytes=sum(record.bytes for name, record in files.items() if name.startswith("onnx/")),
            decode_kv_bytes=decode_kv_bytes(receipt, variant.runtime._pipeline.kv_bytes_per_token_layer),
            contexts=contexts,
        )


def _with_startup(
    results: Sequence[VariantResult],
    kinds: Sequence[tuple[Path, str]],
    request: BenchmarkOptions,
    startup: Callable[..., Startup],
    progress: Progress,
) -> tuple[VariantResult, ...]:
    opening = {"threads": request.threads, "provider": request.provider, "trust": request.trust}
    started, starts = progress.count("starts of a process", len(kinds)), list[Startup]()
    for path, kind in kinds:
        starts.append(startup(path, kind, request.question, request.image, **opening))
        started(len(starts))
    return tuple(replace(variant, startup=start) for variant, start in zip(results, starts, strict=True))
