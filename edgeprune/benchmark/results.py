"""Results of each variant from the receipts of its rounds, compared with the roofline (Williams et al. 2009).

A stage's lower bound is the larger of its operations at the peak of its weights' arithmetic and its bytes at the memory bandwidth.
Weights of 8 and fewer bits are compared with the int8 peak even if the graph unpacks them, because int8 products would be possible.
Not counted: preprocessing, an input cut, and traffic of activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgeprune.benchmark.variants import Variant
from edgeprune.bundle import DECODER, PLAN, VISION, Bundle, Manifest
from edgeprune.device.onnx_file import Graph, read_graph
from edgeprune.device.roofline import Peaks, prefill_operations
from edgeprune.device.workload import Workload, workload_of
from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.runtime.telemetry.receipt import Receipt

RoundCosts = Mapping[str, float]  # the costs of one round, by name
STAGES = ("preprocess_ms", "vision_ms", "select_ms", "prefill_ms")  # their sum is ttft_ms

_FLOATS = {"float32": "fp32", "float64": "fp32", "float16": "fp16", "bfloat16": "fp16"}


@dataclass(frozen=True)
class Spread:
    """Median and 95th percentile over the rounds, with linear interpolation."""

    p50: float
    p95: float


@dataclass(frozen=True)
class ContextPoint:
    """Decode steps after a question of `keys` text tokens, plus the image in the KV caches. `context`: the requested text tokens.

    `ratio` to the baseline: median over the rounds. `kv_bytes`: all caches at the end. `roofline`: lower bound divided by measured
    time; None without peaks.
    """

    context: int
    keys: int
    ms_per_token: Spread
    ratio: float
    kv_bytes: int
    roofline: float | None = None


@dataclass(frozen=True)
class Startup:
    """A new process from import to its second answer, both answers without cached images; milliseconds and bytes.

    `read_ms`: reading the bundle's files from the page cache without loading them, to compare with `load_ms`. `loading_rss_bytes`:
    peak resident set until loading ends. `peak_rss_bytes`: peak while answering (with loading if the kernel cannot reset it). None
    if unknown.
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
    """Lower bounds in milliseconds of vision encoder, prefill and decode step, and their shares of the measured times.

    `ttft`: the share of vision encoder and prefill together. `arithmetic`: of the weights of vision encoder and decoder.
    """

    vision_ms: float
    prefill_ms: float
    token_ms: float
    vision: float
    prefill: float
    ttft: float
    token: float
    arithmetic: tuple[str, str]


@dataclass(frozen=True)
class VariantResult:
    """Measured costs of one variant: `costs` by name, and `ratios` to the baseline (median of the ratios of each round).

    `visual_tokens`: mean over the layers in prefill. `reused`: whether the second question about the image reused its KV caches.
    `cuts`: name and visual tokens before and after each. `weight_bytes`: of the bundle's graphs. `decode_kv_bytes`: mean bytes of
    the caches that a decode step reads. `step_nodes`: nodes of the graph that run in a decode step; None if unknown. `contexts`,
    `startup` and `roofline` are empty or None if not measured.
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
    step_nodes: int | None = None

    @property
    def rss_ratio(self) -> float | None:
        """Peak resident set while answering, divided by the bytes of weights and KV caches."""
        peak = self.startup.peak_rss_bytes if self.startup else None
        return None if peak is None else peak / (self.weight_bytes + self.costs["kv_bytes"].p50)


def row_of(first: Receipt, recalled: Receipt, second: Receipt, joules: float | None) -> RoundCosts:
    """Return the costs of one round.

    `first`: an answer about a new image. `recalled`: the same question in another conversation, up to its first token, which may
    use cached results. `second`: a further question in that conversation. `joules`: energy of the first answer.
    """
    times = first.times
    row = {name: float(getattr(times, name)) for name in STAGES}
    row |= {"ttft_ms": times.ttft_ms, "recalled_ttft_ms": recalled.times.ttft_ms, "repeated_ttft_ms": second.times.ttft_ms}
    row |= {"ms_per_token": times.ms_per_token}
    row |= {"tokens_per_second": 1e3 * len(times.decode_ms) / sum(times.decode_ms), "kv_bytes": float(first.kv_bytes)}
    known = {"overhead": times.overhead, "energy_j": joules}
    return {**row, **{name: value for name, value in known.items() if value is not None}}


def decode_kv_bytes(receipt: Receipt, entry: int) -> float:
    """Return the mean bytes of KV cache that a decode step reads; `entry`: bytes of one token in one layer.

    These are all bytes except the visual tokens that a decode cut skips.
    """
    skipped = receipt.visual_stored - sum(receipt.visual_reads) / len(receipt.visual_reads)
    return receipt.kv_bytes - entry * skipped


def spreads(rows: Sequence[RoundCosts]) -> dict[str, Spread]:
    """Return the median and the 95th percentile of each cost that every round has."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: spread([row[name] for row in rows]) for name in names}


def ratios(rows: Sequence[RoundCosts], baseline: Sequence[RoundCosts]) -> dict[str, float]:
    """Return the median ratio of each cost to the baseline's in the same round; costs with a zero baseline are omitted."""
    names = [name for name in rows[0] if all(name in row and base.get(name) for row, base in zip(rows, baseline, strict=True))]
    return {name: median([row[name] / base[name] for row, base in zip(rows, baseline, strict=True)]) for name in names}


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the 95th percentile."""
    return Spread(median(values), float(np.percentile(values, 95)))


def median(values: Sequence[float]) -> float:
    """Return the median as a float."""
    return float(np.median(values))


@dataclass(frozen=True)
class Sizes:
    """Sizes of a bundle: its workload, operators and constants of vision encoder and decoder, and how much of the cache steps read.

    `kv_share`: the bytes of keys and values that a decode step reads, as a share of the cache's own.
    """

    work: Workload
    vision: Graph
    decoder: Graph
    kv_share: float = 1.0


def bundle_at(path: Path) -> Bundle:
    """Return a bundle that was loaded and checked before."""
    return Bundle(path, Manifest.load(path), KeepPlan.load(path / PLAN))


def sizes_of(path: Path) -> Sizes:
    """Return the sizes of a bundle that was loaded and checked before; raise BundleError if a graph cannot be read."""
    bundle = bundle_at(path)
    work = workload_of(bundle, text_tokens=1, generated=1)
    share = 1 / np.dtype(bundle.manifest.decoder.cache_type).itemsize if bundle.manifest.kv == "int8" else 1.0
    return Sizes(work, read_graph(bundle.file(VISION)), read_graph(bundle.file(DECODER)), share)


def with_roofline(figures: VariantResult, asked: Variant, sizes: Sizes, peaks: Peaks) -> VariantResult:
    """Return a variant's result with the roofline of each time.

    Raises UsageError if the peaks lack a needed arithmetic.
    """
    work = sizes.work if asked.prune else sizes.work.unpruned()
    work = replace(work, alive=asked.alive, text_tokens=figures.text_tokens)
    names = arithmetic_of(sizes.vision, peaks), arithmetic_of(sizes.decoder, peaks)
    weights = sum(sizes.decoder.bytes.values())
    vision = peaks.least_ms(work.tower.work, names[0], sum(sizes.vision.bytes.values()))
    prefill = peaks.least_ms(prefill_operations(work), names[1], weights)
    token = 1e3 * (weights + sizes.kv_share * figures.decode_kv_bytes) / peaks.bandwidth
    took = [figures.costs[name].p50 for name in ("vision_ms", "prefill_ms", "ms_per_token")]
    shares = [least / measured for least, measured in zip((vision, prefill, token), took, strict=True)]
    ttft = (vision + prefill) / (took[0] + took[1])
    line = Roofline(vision, prefill, token, shares[0], shares[1], ttft, shares[2], names)
    contexts = tuple(
        replace(at, roofline=1e3 * (weights + sizes.kv_share * at.kv_bytes) / peaks.bandwidth / at.ms_per_token.p50)
        for at in figures.contexts
    )
    return replace(figures, roofline=line, contexts=contexts)


def arithmetic_of(graph: Graph, peaks: Peaks) -> str:
    """Return the arithmetic of most of a graph's weights. FP16 becomes FP32 if the peaks have no FP16, as on CPUs."""
    name = _FLOATS.get(graph.main_type, "int8")
    if name == "fp16" and name not in peaks.operations:
        name = "fp32"
    if name not in peaks.operations or "fp32" not in peaks.operations:
        raise UsageError(f"The report has no peak of {name} products.", hint="Measure again: edgeprune profile BUNDLE -o FILE")
    return name
