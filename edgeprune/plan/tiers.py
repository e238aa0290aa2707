"""Tiers: several plans over the same graphs, such as quality, balanced and fast.

All have the same cuts and differ in how many tokens each keeps, so that one decoder serves them all: the graph holds the budgets of
every tier, and the length of a marker says whose count.
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
    """Plans by name, from the one that keeps most to the one that keeps least."""

    plans: Mapping[str, KeepPlan]

    def __post_init__(self) -> None:
        for name in self.plans:
            if not _NAME.fullmatch(name):
                raise PlanError(f"{name!r} is no name of a tier.", hint="Use lower-case letters, digits and hyphens, such as fast.")
        if len(self.plans) < 2:
            raise PlanError("Tiers are two plans or more.", hint="Export one plan with --plan.")
        first, *others = self.plans.items()
        for pair in zip([first, *others], others, strict=False):
            _check_next(*pair)

    @classmethod
    def of(cls, plans: Mapping[str, KeepPlan]) -> Tiers:
        """Return tiers of plans of which some lack cuts between layers, or of caches, that others have: they keep all tokens there.

        Raises PlanError for plans that one decoder cannot serve.
        """
        places = {(cut.site, cut.layer): cut for plan in plans.values() for cut in plan.cuts}
        return cls({name: _completed(plan, list(places.values())) for name, plan in plans.items()})

    @property
    def lower_tiers(self) -> tuple[KeepPlan, ...]:
        """All plans but the first."""
        return tuple(self.plans.values())[1:]


def tier_number(names: Sequence[str], name: str) -> int:
    """Return the number of a tier among those of a bundle; raise UsageError for one that is not there."""
    if name not in names:
        hint = f"Its tiers are: {', '.join(names)}." if names else "It has one plan; export it with --tier for several."
        raise UsageError(f"The bundle has no tier {name!r}.", hint=hint)
    return list(names).index(name)


def budgets(plans: Sequence[KeepPlan], cut: Cut) -> tuple[int, ...]:
    """Return what the tiers keep at a cut of the first."""
    number = plans[0].cuts.index(cut)
    return tuple(plan.cuts[number].keep for plan in plans)


def tokens_at_layer(plans: Sequence[KeepPlan], layer: int) -> tuple[int, ...]:
    """Return how many visual tokens decoder layer `layer` sees in prefill under each tier."""
    return tuple(plan.tokens_at_layer(layer) for plan in plans)


def cache_group(plans: Sequence[KeepPlan], layer: int) -> tuple[tuple[int, bool], ...]:
    """Return what all layers have in common whose visual caches are of one length throughout generation, under every tier."""
    return tuple(plan.cache_group(layer) for plan in plans)


def _completed(plan: KeepPlan, places: Sequence[Cut]) -> KeepPlan:
    have = {(cut.site, cut.layer) for cut in plan.cuts}
    missing = [cut for cut in places if (cut.site, cut.layer) not in have and cut.site in ("layer", "cache")]
    for cut in sorted(missing, key=lambda cut: (SITES.index(cut.site), cut.layer)):
        plan = plan.with_cuts(replace(cut, keep=plan.tokens_at_layer(cut.layer)))
    return plan


def _check_next(before: tuple[str, KeepPlan], after: tuple[str, KeepPlan]) -> None:
    (name, plan), (other, lower) = before, after
    if (plan.family, plan.layers, plan.geometry) != (lower.family, lower.layers, lower.geometry):
        raise PlanError(f"The tiers {name} and {other} are plans for different models or image sizes.")
    if [_kind(cut) for cut in plan.cuts] != [_kind(cut) for cut in lower.cuts]:
        raise PlanError(
            f"The tiers {name} and {other} have different cuts.",
            hint="Tiers differ in how many tokens their cuts keep, and in nothing else.",
        )
    for cut, less in zip(plan.cuts, lower.cuts, strict=True):
        if less.keep > cut.keep:
            raise PlanError(
                f"At {cut} tier {other} keeps {less.keep} tokens and {name} only {cut.keep}.", hint="Name the best tier first."
            )
        if cut.site == "vision" and less.keep != cut.keep:
            raise PlanError(
                f"The tiers {name} and {other} keep different counts inside the vision encoder, {cut}.",
                hint="It would be held in memory once for each; let tiers differ at the input, between layers and in caches.",
            )


def _kind(cut: Cut) -> Cut:
    return replace(cut, keep=1)
