"""Plans of every method at a given cost, so that methods can be compared at equal cost.

The cost of a plan is its mean keep ratio over the decoder's layers. This is the share of the visual tokens' work in prefill,
except for the small quadratic part of attention. Cache and decode methods do not change prefill; their cost is the share of the
visual cache that is held (cache) or read (decode).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from edgeprune.calibration.allocate.budgets import (
    LIVE,
    class_rule,
    classify,
    fitprune_plan,
    least_cost_shares,
    live_plan,
    plphp_plan,
    vtw_plan,
)
from edgeprune.calibration.data.statistics import Statistics
from edgeprune.errors import PlanError, UsageError
from edgeprune.plan import Cut, Geometry, KeepPlan, check_keep_ratio, keep_count
from edgeprune.plan.presets import DEFAULT_LAYER, encoder_count, ranked_plan
from edgeprune.registry import METHODS, method_class, unknown_method

INPUT = ("cdpruner", "dart", "divprune", "evs", "random", "uniform", "visionzip", "zspaprune")
STATISTICAL = ("fitprune", "plphp", "vtw")
RESIZE = "resize"
ALLOCATORS = ("classes", "least-cost", "even")
# SparseVLM's table for 192 of 576 tokens: the outputs of layers 2, 6 and 15 of 32 are pruned.
_SPARSEVLM = {2 / 32: 300 / 576, 6 / 32: 200 / 576, 15 / 32: 110 / 576}
_PYRAMID = (0.25, 0.5, 0.75)  # relative depth; PyramidDrop cuts after layers 8, 16 and 24 of 32


def method_names() -> list[str]:
    """Return the methods of `plan_for_budget`: all registered ones except those that are trained, plus RESIZE."""
    return sorted({*METHODS, RESIZE} - {"dyrate", "learned"})


def parts_needed(method: str, settings: Mapping[str, Any], share: float | None = None) -> tuple[str, ...]:
    """Return the parts of the statistics (`PARTS`) that a method takes in its settings, at a `share` of the cost if given."""
    allocate = settings.get("allocate", ALLOCATORS[0])
    by_class = allocate == ALLOCATORS[0] or settings.get("classes") == LIVE
    needed = {
        "attention": method in ("dyrate", "plphp") and bool(settings.get("prior") or (method == "plphp" and by_class)),
        "caches": method == "plphp" and allocate == "least-cost",
        "withdrawals": method == "vtw" and share is None,
        "fitprune": method == "fitprune",
    }
    return tuple(part for part, takes in needed.items() if takes)


def plan_for_budget(method: str, share: float, base: KeepPlan, statistics: Statistics | None = None, **settings: Any) -> KeepPlan:
    """Return `base` with a method's cuts, at `share` of the cost of `base`.

    `settings`: `site` of a baseline, if "cache"; `layer` of a single cut; the calibration options of PLPHP and FitPrune, the
    `weights` of its learned ranking, and how caches are ranked (`ranking`) where nothing else needs statistics; all others become
    options of the cut. Raises PlanError if the method cannot reach this cost.
    """
    check_keep_ratio(share)
    if method in STATISTICAL:
        return _from_statistics(method, share, base, statistics, settings)
    if method == RESIZE:
        if base.cuts:
            raise PlanError("A smaller image comes before all cuts.", hint="Add the other methods onto a resized plan.")
        return replace(base, geometry=resized(base.geometry, share))
    recipes: dict[str, Callable[..., KeepPlan]] = {
        "evit": _encoder_cut,
        "fastv": _one_cut,
        "pyramiddrop": _pyramid,
        "sparsevlm": _sparsevlm,
    }
    if method in INPUT:
        return _input_or_baseline(method, share, base, settings)
    if method not in recipes:
        raise unknown_method(method, ["auto", "dyrate", "learned", *method_names()])
    return recipes[method](method, share, base, **settings)


def resized(geometry: Geometry, share: float) -> Geometry:
    """Return the geometry of a smaller image of the same aspect ratio with about `share` of the visual tokens.

    Raises PlanError for an image in several views, because its token count does not depend on its size.
    """
    if geometry.views:
        raise PlanError("An image that is cut into views has as many visual tokens at any size.", hint="Use another baseline.")
    unit, scale = geometry.patch * geometry.merge, math.sqrt(share)
    rows, columns = max(1, round(geometry.rows * scale)), max(1, round(geometry.columns * scale))
    return Geometry(rows * unit, columns * unit, geometry.patch, geometry.merge)


def _input_or_baseline(method: str, share: float, base: KeepPlan, settings: dict[str, Any]) -> KeepPlan:
    site, options = settings.get("site", "input"), {name: value for name, value in settings.items() if name != "site"}
    if site == "input":
        cut = Cut("input", method, keep_count(base.tokens_entering_decoder, share, method), options=options)
        method_class(method)(cut, base.geometry)  # raises for an unsupported geometry, such as images for a video method
        return base.with_cuts(cut)
    counts = [keep_count(base.tokens_at_layer(layer), share, method) for layer in range(base.layers)]
    return base.with_cuts(*(Cut(site, method, count, layer, options=options) for layer, count in enumerate(counts)))


def _from_statistics(
    method: str, share: float, base: KeepPlan, statistics: Statistics | None, settings: dict[str, Any]
) -> KeepPlan:
    if method == "vtw":
        return vtw_plan(None, base, share)
    if statistics is None:
        if parts_needed(method, settings, share):
            raise UsageError(f"{method} needs statistics.", hint="Give samples to collect them from: --data FILE.jsonl")
        _check_allocator(settings)
        counts = [int(base.tokens_at_layer(layer) * share + 1e-9) for layer in range(base.layers)]
        return ranked_plan(base, counts, None, settings.get("weights"), **settings["ranking"])
    if method == "fitprune":
        return fitprune_plan(statistics, base, share, **settings)
    ranked: dict[str, Any] = {"prior": bool(settings.get("prior")), "weights": settings.get("weights")}
    _check_allocator(settings)
    if settings.get("classes") == LIVE:
        return live_plan(statistics, base, class_rule(statistics, share, settings), **ranked)
    return plphp_plan(statistics, base, plphp_shares(statistics, share, settings), **ranked)


def plphp_shares(statistics: Statistics, share: float, settings: dict[str, Any]) -> list[float]:
    """Return the keep ratio of each layer's cache, by the allocator that `settings` names (one of ALLOCATORS)."""
    allocate = settings.get("allocate", ALLOCATORS[0])
    if allocate == "even":
        return [share] * statistics.source.layers
    if allocate == "least-cost":
        return least_cost_shares(statistics, share)
    return [layer.share for layer in classify(statistics, class_rule(statistics, share, settings))]


def _check_allocator(settings: dict[str, Any]) -> None:
    allocate = settings.get("allocate", ALLOCATORS[0])
    for name in ("classes", "r", "delta", "alpha", "beta"):
        if allocate != ALLOCATORS[0] and name in settings:
            raise UsageError(f"Option {name!r} is of the classes, not of allocate={allocate}.", hint="Leave one of them out.")


def _one_cut(method: str, share: float, base: KeepPlan, layer: int = DEFAULT_LAYER) -> KeepPlan:
    if not 0 < layer < base.layers:
        raise PlanError(f"{method} cannot cut before layer {layer} of {base.layers}.")
    ratio = (share * base.layers - layer) / (base.layers - layer)
    if ratio <= 0:
        raise PlanError(f"{method} before layer {layer} cannot reach {share:.0%}: {layer} layers see every token.")
    return base.with_cuts(Cut("layer", method, keep_count(base.tokens_at_layer(layer - 1), ratio, method), layer))


def _encoder_cut(method: str, share: float, base: KeepPlan, layer: int | None = None) -> KeepPlan:
    if layer is None:
        raise PlanError(f"{method} cuts before a block of the vision encoder.", hint="Say which: --layer 4")
    return base.with_cuts(Cut("vision", method, encoder_count(base.geometry, share, method), layer))


def _pyramid(method: str, share: float, base: KeepPlan) -> KeepPlan:
    def kept(stage: int) -> Callable[[float], float]:
        return lambda ratio: ratio**stage  # every stage keeps the same share of the stage before it

    return _staircase(method, share, base, {place * base.layers: kept(stage) for stage, place in enumerate(_PYRAMID, start=1)})


def _sparsevlm(method: str, share: float, base: KeepPlan) -> KeepPlan:
    def kept(published: float) -> Callable[[float], float]:
        # Interpolates from 0 (ratio 0) over the published keep ratio (0.5) to 1 (ratio 1).
        return lambda ratio: published * 2 * ratio if ratio < 0.5 else published + (1 - published) * (2 * ratio - 1)

    after = {round(place * base.layers): published for place, published in _SPARSEVLM.items()}
    return _staircase(method, share, base, {layer + 1: kept(published) for layer, published in after.items()})


def _staircase(method: str, share: float, base: KeepPlan, steps: dict[float, Callable[[float], float]]) -> KeepPlan:
    # Bisects for the largest ratio whose plan costs at most `share`. `steps`: the kept share of all tokens at a ratio, by layer.
    def plan_at(ratio: float) -> KeepPlan:
        cuts = {max(1, round(layer)): step(ratio) for layer, step in steps.items()}
        return base.with_cuts(
            *(
                Cut("layer", method, max(1, int(base.tokens_entering_decoder * kept + 1e-9)), layer)
                for layer, kept in cuts.items()
                if layer < base.layers
            )
        )

    def affordable(ratio: float) -> bool:
        budget = share * base.tokens_entering_decoder * base.layers
        return sum(map(plan_at(ratio).tokens_at_layer, range(base.layers))) <= budget

    low, high = 0.0, 1.0
    if not affordable(low):
        raise PlanError(f"{method} cannot reach {share:.0%}: its first layers see every token.", hint="Cut at the input as well.")
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if affordable(middle) else (low, middle)
    return plan_at(low)
