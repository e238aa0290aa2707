"""Simple plans: unpruned, ranked KV caches, and a staircase of keep ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeprune.errors import PlanError
from edgeprune.plan.geometry import Geometry
from edgeprune.plan.keep_plan import Cut, KeepPlan, keep_count
from edgeprune.plan.weights import Weights

DEFAULT_LAYER = 2  # FastV's default layer


def unpruned_plan(family: str, layers: int, geometry: Geometry) -> KeepPlan:
    """Return the plan that keeps every visual token."""
    return KeepPlan(family, layers, geometry)


def ranked_plan(
    base: KeepPlan,
    keeps: Sequence[int] | None = None,
    priors: Sequence[list[list[int]]] | None = None,
    weights: Weights | None = None,
    **options: Any,
) -> KeepPlan:
    """Return `base` with a PLPHP cache cut in every layer that ranks its tokens and keeps `keeps[layer]` (None: all).

    `priors`: for each layer and KV head, an order of the image's tokens. `weights`: of a learned ranking. `options`: other settings
    of `edgeprune.methods.plphp`.
    """
    counts = [base.tokens_at_layer(layer) for layer in range(base.layers)] if keeps is None else keeps
    prior_options = [{} for _ in counts] if priors is None else [{"prior": prior} for prior in priors]
    return base.with_cuts(
        *(Cut("cache", "plphp", counts[n], n, options={**options, **prior_options[n]}, weights=weights) for n in range(base.layers))
    )


def staircase_plan(
    base: KeepPlan,
    method: str,
    keeps: Sequence[float],
    at_layers: Sequence[int] = (),
    *,
    seed: int = 0,
    site: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> KeepPlan:
    """Return `base` with one cut per keep ratio, at the layer with the same index in `at_layers`.

    Keep ratios are shares of all visual tokens, at site "vision" of each view's tokens. A single ratio without a layer is cut at
    DEFAULT_LAYER. Layer 0 means the input site unless `site` is given. `options`: settings of the method, for all cuts. Raises
    PlanError if the numbers of ratios and layers differ or the keep budgets increase.
    """
    layers = cut_layers(keeps, at_layers)
    cuts = tuple(
        Cut(
            site=site or ("layer" if layer else "input"),
            method=method,
            keep=encoder_count(base.geometry, keep, method) if site == "vision" else keep_count(base.geometry.tokens, keep, method),
            layer=layer,
            seed=seed,
            options=options or {},
        )
        for keep, layer in zip(keeps, layers, strict=True)
    )
    return KeepPlan(base.family, base.layers, base.geometry, cuts)


def cut_layers(keeps: Sequence[float], at_layers: Sequence[int]) -> tuple[int, ...]:
    """Return the layer of each keep ratio; raise PlanError if their numbers differ."""
    layers = tuple(at_layers) or ((DEFAULT_LAYER,) if len(keeps) == 1 else ())
    if len(layers) != len(keeps):
        raise PlanError(f"{len(keeps)} keep ratios but {len(layers)} layers.", hint="Give one --layer for each --keep.")
    return layers


def encoder_count(geometry: Geometry, keep: float, method: str) -> int:
    """Return the keep budget of a vision cut: the same number for every view, at least one."""
    views = len(geometry.layout)
    return views * keep_count(geometry.tokens // views, keep, method)
