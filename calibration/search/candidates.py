"""The candidates of a search: every method alone, in its variants, and then cuts at several sites that cost together as much.

A composition follows the data: a cut inside the vision encoder or a smaller image comes before an input cut, then cuts between
layers, then cuts of the KV caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from edgeprune.calibration.allocate.recipes import INPUT, RESIZE, method_names, plan_for_budget, resized
from edgeprune.calibration.data.statistics import Statistics
from edgeprune.calibration.search.pareto import PlanFactory
from edgeprune.errors import PlanError
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.presets import encoder_count

BASELINES = ("random", "uniform", RESIZE)
ENCODER = "evit"  # the method that ranks inside the vision encoder
Recipe = tuple[str, PlanFactory]  # group, a method or "composed", and how its plans are made
_VARIANTS: dict[str, list[dict[str, Any]]] = {
    "zspaprune": [{"core": 0.0}, {"core": 0.15}, {"core": 0.3}, {"core": 0.5}, {"core": 0.3, "relevance": "max"}],
    "cdpruner": [{"weight": 0.2}, {"weight": 0.5}, {"weight": 0.8}],
    "fastv": [{"layer": 1}, {"layer": 2}, {"layer": 3}],
}
_ENCODER_PARTS = (1 / 3, 1 / 2, 2 / 3)  # of the encoder's blocks, before which tokens may leave

_MORE = (1.25, 1.6, 2.2)  # times the mean that an input cut leaves, where layer cuts make up for it
_ENCODED = (0.75, 0.5)  # of the tokens that leave the encoder, where cuts behind it take the rest
_LAYERED: list[tuple[str, dict[str, Any]]] = [
    ("fastv", {"layer": 1}),
    ("fastv", {"layer": 2}),
    ("fastv", {"layer": 3}),
    ("sparsevlm", {}),
    ("pyramiddrop", {}),
]
_CACHED: list[dict[str, Any]] = [
    {"allocate": allocate, "prior": prior} for allocate in ("classes", "least-cost", "even") for prior in (False, True)
]
Part = Callable[[float], float]  # of the tokens, in (0, 1], that one of several cuts leaves at a share


def single_method_candidates(unpruned: KeepPlan, statistics: Statistics, blocks: int) -> Iterator[Recipe]:
    """Return every method that leaves fewer tokens to the decoder, alone; inside an encoder of so many `blocks`, 0 for none."""
    for method in method_names():
        if method in (ENCODER, "plphp"):  # the first needs to be told blocks, the second leaves prefill as it is
            continue
        for settings in _VARIANTS.get(method, [{}]):
            yield method, partial(_alone, method, settings, unpruned, statistics)
    for places in encoder_places(blocks):
        for method in (ENCODER, "uniform"):
            yield method, partial(encoder_plan, unpruned, method, places)


def _alone(method: str, settings: dict[str, Any], unpruned: KeepPlan, statistics: Statistics, share: float) -> KeepPlan:
    return plan_for_budget(method, share, unpruned, statistics, **settings)


def input_cuts() -> list[Cut]:
    """Return a cut of every input method that may stand behind vision cuts, in its variants; what it keeps is of no account."""
    methods = [method for method in INPUT if method not in (*BASELINES, "evs")]
    return [Cut("input", method, 1, options=options) for method in methods for options in _VARIANTS.get(method, [{}])]


def encoder_blocks(blocks: int) -> list[int]:
    """Return the blocks of a vision encoder before which tokens may leave; none where it has too few."""
    return sorted({block for part in _ENCODER_PARTS if 0 < (block := round(blocks * part)) < blocks})


def encoder_places(blocks: int) -> list[tuple[int, ...]]:
    """Return where vision cuts are tried: at one block, or at the first and the last of them."""
    found = encoder_blocks(blocks)
    return [*((block,) for block in found), *([(found[0], found[-1])] if len(found) > 1 else [])]


def encoder_plan(unpruned: KeepPlan, method: str, places: tuple[int, ...], share: float) -> KeepPlan:
    """Return the plan whose vision cuts leave `share` of the tokens in the end, each cut the same part of those before it."""
    keeps = [encoder_count(unpruned.geometry, share ** (step / len(places))) for step in range(1, len(places) + 1)]
    return unpruned.with_cuts(*(Cut("vision", method, keep, block) for keep, block in zip(keeps, places, strict=True)))


@dataclass(frozen=True)
class CandidateComposer:
    """Makes compositions for a model: its unpruned plan and its statistics."""

    unpruned: KeepPlan
    statistics: Statistics

    def inward(self, cut: Cut) -> Iterator[PlanFactory]:
        """Keep more at the input, and make up for it further in: the rest withdrawn, or ranked by attention. Or a smaller image."""
        yield partial(self._at_input, self._smaller, cut)
        yield from self._layered_behind(self._unpruned, cut)

    def encoder_first(self, places: tuple[int, ...], cuts: Sequence[Cut]) -> Iterator[PlanFactory]:
        """Cut inside the vision encoder before the blocks `places`, and then at the input or between layers."""
        for part in (*(partial(_constant, part) for part in _ENCODED), partial(_root, 2)):  # a root: each site the same part
            base: PlanFactory = partial(self._encoded, places, part)
            for cut in cuts:
                yield partial(self._at_input, base, cut)
            for method, settings in _LAYERED:
                yield partial(self._behind, base, method, settings)

    def encoder_inward(self, places: tuple[int, ...], cut: Cut) -> Iterator[PlanFactory]:
        """Cut inside the vision encoder before the blocks `places`, at the input, and further in."""
        yield from self._layered_behind(partial(self._encoded, places, partial(_root, 3)), cut)

    def caches(self, cut: Cut | None = None, places: tuple[int, ...] = ()) -> Iterator[PlanFactory]:
        """Cut the caches; with `cut` or `places`, at the input or inside the vision encoder first, each saving the same part."""
        sites = 1 + (cut is not None) + bool(places)
        for settings in _CACHED:
            base: PlanFactory = partial(self._encoded, places, partial(_root, sites)) if places else self._unpruned
            if cut is not None:
                base = partial(self._at_input, base, cut, part=lambda share: share ** ((sites - 1) / sites))
            yield partial(self._behind, base, "plphp", settings)

    def _unpruned(self, share: float) -> KeepPlan:
        return self.unpruned

    def _smaller(self, share: float) -> KeepPlan:
        return replace(self.unpruned, geometry=resized(self.unpruned.geometry, 0.5))

    def _encoded(self, places: tuple[int, ...], part: Part, share: float) -> KeepPlan:
        return encoder_plan(self.unpruned, ENCODER, places, part(share))

    def _at_input(self, base: PlanFactory, cut: Cut, share: float, part: Part = lambda share: share) -> KeepPlan:
        plan = base(share)
        return plan.with_cuts(
            replace(cut, keep=max(1, min(plan.tokens_entering_decoder, int(part(share) * self.unpruned.geometry.tokens + 1e-9))))
        )

    def _behind(self, base: PlanFactory, method: str, settings: dict[str, Any], share: float) -> KeepPlan:
        plan = base(share)
        return plan_for_budget(
            method,
            min(1.0, share * self.unpruned.geometry.tokens / plan.tokens_entering_decoder),
            plan,
            self.statistics,
            **settings,
        )

    def _layered_behind(self, base: PlanFactory, cut: Cut) -> Iterator[PlanFactory]:
        for layer in range(1, self.unpruned.layers):
            yield partial(self._withdrawn, base, cut, layer)
            for more in _MORE:
                for method in ("fastv", "sparsevlm"):
                    yield partial(self._ranked, base, cut, method, layer, more)

    def _withdrawn(self, base: PlanFactory, cut: Cut, layer: int, share: float) -> KeepPlan:
        early = self._at_input(base, cut, share, part=lambda share: share * self.unpruned.layers / layer)
        return early.with_cuts(Cut("layer", "vtw", 0, layer))

    def _ranked(self, base: PlanFactory, cut: Cut, method: str, layer: int, more: float, share: float) -> KeepPlan:
        early = self._at_input(base, cut, share, part=lambda share: more * share)
        layers, first = self.unpruned.layers, early.tokens_entering_decoder
        rest = int((share * self.unpruned.geometry.tokens * layers - first * layer) / (layers - layer))
        if rest <= 0:
            raise PlanError(f"{cut} leaves nothing to the layers from {layer} on.")
        return early.with_cuts(Cut("layer", method, min(first, rest), layer))


def _constant(part: float, share: float) -> float:
    del share
    return part


def _root(degree: int, share: float) -> float:
    root: float = share ** (1 / degree)
    return root


def is_noop(plan: KeepPlan) -> bool:
    """Return whether a cut of hidden states keeps all that is there: the plan is another one in disguise."""
    alive = plan.geometry.tokens
    for cut in plan.cuts:
        if cut.site in ("vision", "input", "layer"):
            if cut.keep >= alive:
                return True
            alive = cut.keep
    return False
