"""Make a keep plan from what a user says: a method, keep ratios and the layers where they begin."""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.errors import PlanError
from edgeprune.plan import Cut, Geometry, KeepPlan, keep_count

DEFAULT_LAYER = 2  # FastV's canonical place


def unpruned_plan(family: str, layers: int, geometry: Geometry) -> KeepPlan:
    """Return the plan that keeps every visual token."""
    return KeepPlan(family, layers, geometry)


def staircase_plan(
    base: KeepPlan, method: str, keeps: Sequence[float], at_layers: Sequence[int] = (), *, seed: int = 0
) -> KeepPlan:
    """Return `base` with one cut per keep ratio, each a share of all visual tokens, at the layer of the same position.

    One ratio without a layer is cut at DEFAULT_LAYER; layer 0 is the input site. Raises PlanError when the numbers of ratios and
    layers differ or the counts grow.
    """
    layers = tuple(at_layers) or ((DEFAULT_LAYER,) if len(keeps) == 1 else ())
    if len(layers) != len(keeps):
        raise PlanError(f"{len(keeps)} keep ratios but {len(layers)} layers.", hint="Give one --layer for each --keep.")
    cuts = tuple(
        Cut(
            site="layer" if layer else "input",
            method=method,
            keep=keep_count(base.geometry.tokens, keep),
            layer=layer,
            seed=seed,
        )
        for keep, layer in zip(keeps, layers, strict=True)
    )
    return KeepPlan(base.family, base.layers, base.geometry, cuts)
