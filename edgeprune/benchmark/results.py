"""The results of each variant, made from the receipts of its rounds, beside the roofline (Williams et al. 2009).

A stage takes at least the time of its operations at the peak of the arithmetic that its weights are stored for, and the time of
its bytes at the memory bandwidth. Weights of 8 and fewer bits are compared with int8 products even where a graph unpacks them
first, because that is what the graph forgoes. Not counted: preprocessing, a selection before the decoder, and the traffic of
activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgeprune.benchmark.variants import Variant
from edgeprune.bundle import DECODER, PLAN, VISION, Bundle, Manifest
from edgeprune.device.onnx_file import Graph, read_graph
from edgeprune.device.roofline import Peaks, prefill_operations, vision_operations
from edgeprune.device.workload import Workload, workload_of
from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.runtime.telemetry.receipt import Receipt

RoundCosts = Mapping[str, float]  # the costs of one round, by name
STAGES = ("preprocess_ms", "vision_ms", "select_ms", "prefill_ms")  # they add up to ttft_ms

_FLOATS = {"float32": "fp32", "float64": "fp32", "float16": "fp16", "bfloat16": "fp16"}


@dataclass(frozen=True)
class Spread:
    """Median and 95th percentile over the rounds, interpolated between them."""

    p50: float
    p95: float


@dataclass(frozen=True)
class ContextPoint:
    """Decode steps after a question of `keys` text tokens, with the image in the caches besides. `context`: what was asked for.

    `ratio` to the baseline's, the median over the rounds; `kv_bytes` of all caches at the end; `roofline`: the share of the least
    time, None where there are no peaks.
    """

    context: int
    keys: int
    ms_per_token: Spread
    ratio: float
    kv_bytes: int
    roofline: float | None = None


@dataclass(frozen=True)
class Startup:
    """A fresh process up to its second answer, whose image is new as well; milliseconds and bytes.

    `read_ms`: reading the files of the bundle from the system's cache, and nothing else, beside `load_ms`. `loading_rss_bytes`: the
    largest resident set up to the end of loading; `peak_rss_bytes`: while it answered (loading included where the kernel does not
    count anew); None where nobody knows.
    """

    import_ms: float
    read_ms: float
    load_ms: float
    first_ttft_ms: float
    second_ttft_ms: float
    loading_rss_bytes: int | None
    peak_rss_bytes: int | None


@dataclass(frozen=True)
class Roofline:
    """The least milliseconds that peaks allow, and their share in what was measured (`ttft`: vision encoder and prefill; `token`).

    `arithmetic` of the vision encoder's and of the decoder's weights.
    """

    vision_ms: float
    prefill_ms: float
    token_ms: float
    ttft: float
    token: float
    arithmetic: tuple[str, str]


@dataclass(frozen=True)
class VariantResult:
    """What one contender costs: `costs` by name, and `ratios` of them to the baseline, each the median of the rounds' own ratios.

    `visual_tokens`: the mean over the layers in prefill; `reused`: the second question about the image found its caches; `cuts`:
    visual tokens before and after each. `weight_bytes` of the bundle's graphs; `decode_kv_bytes`: what a decode step reads of the
    caches, on the average. The rest is None, or empty, where it was not measured.
    """

    name: str
    costs: Mapping[str, Spread]
    ratios: Mapping[str, float]
    generated: int
    text_tokens: int
    visual_tokens: float
    reused: bool
    cuts: tuple[tuple[str, int, int], ...]
    weight_bytes: int
    decode_kv_bytes: float
    contexts: tuple[ContextPoint, ...] = ()
    startup: Startup | None = None
    roofline: Roofline | None = None

    @property
    def rss_ratio(self) -> float | None:
        """Peak resident set while answering, over the bytes of weights and KV caches."""
        peak = self.startup.peak_rss_bytes if self.startup else None
        return None if peak is None else peak / (self.weight_bytes + self.costs["kv_bytes"].p50)


def row_of(first: Receipt, recalled: Receipt, second: Receipt, joules: float | None) -> RoundCosts:
    """Return the costs of one round: an answer about a new image, the first token of the same question in another conversation,
    which may be `recalled` in part, and of a second one after it.
    """
    times = first.times
    row = {name: float(getattr(times, name)) for name in STAGES}
    row |= {"ttft_ms": times.ttft_ms, "recalled_ttft_ms": recalled.times.ttft_ms, "repeated_ttft_ms": second.times.ttft_ms}
    row |= {"ms_per_token": times.ms_per_token}
    row |= {"tokens_per_second": 1e3 * len(times.decode_ms) / sum(times.decode_ms), "kv_bytes": float(first.kv_bytes)}
    known = {"overhead": times.overhead, "energy_j": joules}
    return {**row, **{name: value for name, value in known.items() if value is not None}}


def decode_kv_bytes(receipt: Receipt, entry: int) -> float:
    """Return the bytes of the caches that a decode step reads, the mean of an answer; `entry`: those of one token in one layer.

    All there are, less the visual tokens that a decode cut passes over.
    """
    passed_over = receipt.visual_stored - sum(receipt.visual_reads) / len(receipt.visual_reads)
    return receipt.kv_bytes - entry * passed_over


def spreads(rows: Sequence[RoundCosts]) -> dict[str, Spread]:
    """Return the median and the 95th percentile of each cost that every round has."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: spread([row[name] for row in rows]) for name in names}


def ratios(rows: Sequence[RoundCosts], baseline: Sequence[RoundCosts]) -> dict[str, float]:
    """Return the median over the rounds of each cost divided by the baseline's of the same round, where that is never zero."""
    names = [name for name in rows[0] if all(name in row and base.get(name) for row, base in zip(rows, baseline, strict=True))]
    return {name: median([row[name] / base[name] for row, base in zip(rows, baseline, strict=True)]) for name in names}


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the 95th percentile."""
    return Spread(median(values), float(np.percentile(values, 95)))


def median(values: Sequence[float]) -> float:
    """Return the median as a plain number."""
    return float(np.median(values))


@dataclass(frozen=True)
class Sizes:
    """What a bundle's graphs hold: operations through `work`, bytes and types of the constants of two graphs."""

    work: Workload
    vision: Graph
    decoder: Graph


def sizes_of(path: Path) -> Sizes:
    """Return the sizes of a bundle, whose files `load` has checked already; raise BundleError when a graph cannot be read."""
    bundle = Bundle(path, Manifest.load(path), KeepPlan.load(path / PLAN))
    work = workload_of(bundle, text_tokens=1, generated=1)
    return Sizes(work, read_graph(bundle.file(VISION)), read_graph(bundle.file(DECODER)))


def with_roofline(figures: VariantResult, asked: Variant, sizes: Sizes, peaks: Peaks) -> VariantResult:
    """Return a contender's figures with the roofline of each time.

    Raises UsageError when the peaks lack an arithmetic.
    """
    work = sizes.work if asked.prune else sizes.work.unpruned()
    work = replace(work, alive=asked.alive, text_tokens=figures.text_tokens)
    names = arithmetic_of(sizes.vision, peaks), arithmetic_of(sizes.decoder, peaks)
    weights = sum(sizes.decoder.bytes.values())
    vision = peaks.least_ms(vision_operations(work), names[0], sum(sizes.vision.bytes.values()))
    prefill = peaks.least_ms(prefill_operations(work), names[1], weights)
    token = 1e3 * (weights + figures.decode_kv_bytes) / peaks.bandwidth
    costs = figures.costs
    measured = costs["vision_ms"].p50 + costs["prefill_ms"].p50
    line = Roofline(vision, prefill, token, (vision + prefill) / measured, token / costs["ms_per_token"].p50, names)
    contexts = tuple(
        replace(at, roofline=1e3 * (weights + at.kv_bytes) / peaks.bandwidth / at.ms_per_token.p50) for at in figures.contexts
    )
    return replace(figures, roofline=line, contexts=contexts)


def arithmetic_of(graph: Graph, peaks: Peaks) -> str:
    """Return what most of a graph's weights can be multiplied in; FP16 is FP32 where the machine has no peak of it, as on CPUs."""
    name = _FLOATS.get(graph.main_type, "int8")
    if name == "fp16" and name not in peaks.operations:
        name = "fp32"
    if name not in peaks.operations or "fp32" not in peaks.operations:
        raise UsageError(f"The report has no peak of {name} products.", hint="Measure again: edgeprune profile BUNDLE -o FILE")
    return name
