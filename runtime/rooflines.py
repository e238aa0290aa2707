"""Measured times beside the least that the machine's peaks allow (Williams et al. 2009).

A stage is at least as long as its operations at the peak of the arithmetic that its weights are stored for, and as its bytes at the
bandwidth. Weights of 8 and fewer bits are held against int8 products, also where a graph unpacks them first: that is what it
forgoes. Left out: preprocessing, a selection before the decoder, and what activations move.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from edgeprune.bundle import DECODER, PLAN, VISION, Bundle, Manifest
from edgeprune.device.graph import Graph, read_graph
from edgeprune.device.roofline import Peaks, prefill_operations, vision_operations
from edgeprune.device.workload import Workload, workload_of
from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.runtime.contenders import Contender
from edgeprune.runtime.figures import Figures, Roofline

_FLOATS = {"float32": "fp32", "float64": "fp32", "float16": "fp16", "bfloat16": "fp16"}


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


def beside(figures: Figures, asked: Contender, sizes: Sizes, peaks: Peaks) -> Figures:
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
