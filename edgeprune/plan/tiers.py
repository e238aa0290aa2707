"""Tiers: several plans over the same graphs, such as quality, balanced and fast.

All tiers have the same cuts with different keep budgets, so that one decoder serves them all. The graph contains the budgets of
every tier; the length of its `tier` input selects one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgeprune.errors import PlanError, UsageError
from edgeprune.plan.keep_plan import SITES, Cut, KeepPlan

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True)
class Tiers:
    """Plans by name, from the largest to the smallest keep budgets."""

    plans: Mapping[str, KeepPlan]

    def __post_init__(self) -> None:
        for name in self.plans:
            if not _NAME.fullmatch(name):
                raise PlanError(f"{name!r} is no name of a tier.", hint="Use lower-case letters, digits and hyphens, such as fast.")
        if len(self.plans) < 2:
            raise PlanError("Tiers are two plans or more.", hint="Export one plan with --plan.")
        first, *others = self.plans.items()
        for pair in zip([first, *others], others, strict=False):
            _check_neighbours(*pair)

    @classmethod
    def of(cls, plans: Mapping[str, KeepPlan]) -> Tiers:
        """Return tiers of plans that may differ in their layer and cache cuts; a missing cut is added and keeps all tokens.

        Raises PlanError if one decoder cannot serve the plans.
        """
        places = {(cut.site, cut.layer): cut for plan in plans.values() for cut in plan.cuts}
        return cls({name: _add_missing_cuts(plan, list(places.values())) for name, plan in plans.items()})

    @property
    def lower_tiers(self) -> tuple[KeepPlan, ...]:
        """All plans except the first."""
        return tuple(self.plans.values())[1:]


def tier_number(names: Sequence[str], name: str) -> int:
    """Return the index of a tier among the `names` of a bundle's tiers; raise UsageError if it is missing."""
    if name not in names:
        hint = f"Its tiers are: {', '.join(names)}." if names else "It has one plan; export it with --tier for several."
        raise UsageError(f"The bundle has no tier {name!r}.", hint=hint)
    return list(names).index(name)


def budgets(plans: Sequence[KeepPlan], cut: Cut) -> tuple[int, ...]:
    """Return the keep budget of every tier at a cut of the first tier's plan."""
    number = plans[0].cuts.index(cut)
    return tuple(plan.cuts[number].keep for plan in plans)


def tokens_at_layer(plans: Sequence[KeepPlan], layer: int) -> tuple[int, ...]:
    """Return the number of visual tokens in decoder layer `layer` during prefill, for each tier."""
    return tuple(plan.tokens_at_layer(layer) for plan in plans)


def cache_group(plans: Sequence[KeepPlan], layer: int) -> tuple[tuple[int, int], ...]:
    """Return a key that is equal for layers whose visual caches have the same length throughout generation in every tier."""
    return tuple(plan.cache_group(layer) for plan in plans)


def _add_missing_cuts(plan: KeepPlan, places: Sequence[Cut]) -> KeepPlan:
    existing = {(cut.site, cut.layer) for cut in plan.cuts}
    missing = [cut for cut in places if (cut.site, cut.layer) not in existing and cut.site in ("layer", "cache")]
    for cut in sorted(missing, key=lambda cut: (SITES.index(cut.site), cut.layer)):
        plan = plan.with_cuts(replace(cut, keep=plan.tokens_at_layer(cut.layer)))
    return plan


def _check_neighbours(before: tuple[str, KeepPlan], after: tuple[str, KeepPlan]) -> None:
    (name, plan), (other, lower) = before, after
    if (plan.family, plan.layers, plan.geometry) != (lower.family, lower.layers, lower.geometry):
        raise PlanError(f"The tiers {name} and {other} are plans for different models or image sizes.")
    if [_without_budget(cut) for cut in plan.cuts] != [_without_budget(cut) for cut in lower.cuts]:
        raise PlanError(
            f"The tiers {name} and {other} have different cuts.",
            hint="Tiers differ in how many tokens their cuts keep, and in nothing else.",
        )
    for cut, lower_cut in zip(plan.cuts, lower.cuts, strict=True):
        if lower_cut.keep > cut.keep:
            raise PlanError(
                f"At {cut} tier {other} keeps {lower_cut.keep} tokens and {name} only {cut.keep}.", hint="Name the best tier first."
            )
        if cut.site == "vision" and lower_cut.keep != cut.keep:
            raise PlanError(
                f"The tiers {name} and {other} keep different counts inside the vision encoder, {cut}.",
                hint="It would be held in memory once for each; let tiers differ at the input, between layers and in caches.",
            )


def _without_budget(cut: Cut) -> Cut:
    # The input has a graph for each tier, and so may have weights that were learned for its count.
    return replace(cut, keep=1, weights=None if cut.site == "input" else cut.weights)
