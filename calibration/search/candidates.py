"""The candidates of a search: every method alone, in its variants, and compositions of cuts at several sites at the same cost.

A composition follows the data flow: a cut inside the vision encoder or a smaller image, then an input cut, then cuts between
decoder layers, then cuts of the KV caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from edgeprune.calibration.allocate.recipes import INPUT, RESIZE, method_names, parts_needed, plan_for_budget, resized
from edgeprune.calibration.data.statistics import Statistics
from edgeprune.calibration.search.pareto import PlanFactory
from edgeprune.errors import PlanError
from edgeprune.plan import Cut, KeepPlan, keep_count
from edgeprune.plan.presets import encoder_count
from edgeprune.registry import METHODS, options_of

BASELINES = ("random", "uniform", RESIZE)
ENCODER = "evit"  # the method that ranks inside the vision encoder
Recipe = tuple[str, PlanFactory]  # group (a method or "composed") and plan factory
Part = Callable[[float], float]  # maps the total cost share to the share of tokens that one of several cuts keeps, in (0, 1]
MOST_LAYERS = 9
_LAYERS = {"fastv": (1, 2, 3)}
_ENCODER_DEPTHS = (1 / 3, 1 / 2, 2 / 3)  # relative depths of cuts inside the vision encoder
_INPUT_FACTORS = (1.25, 1.6, 2.2)  # an input cut keeps this multiple of the mean if layer cuts follow
_ENCODER_RATIOS = (0.75, 0.5)  # keep ratios of vision cuts that other cuts follow
_LAYER_METHODS: list[tuple[str, dict[str, Any]]] = [
    ("fastv", {"layer": 1}),
    ("fastv", {"layer": 2}),
    ("fastv", {"layer": 3}),
    ("sparsevlm", {}),
    ("pyramiddrop", {}),
]
_CACHE_SETTINGS: list[dict[str, Any]] = [
    {"allocate": allocate, "prior": prior} for allocate in ("classes", "least-cost", "even") for prior in (False, True)
]


def single_method_candidates(
    unpruned: KeepPlan, statistics: Statistics | None, blocks: int, learned: Sequence[Cut] = ()
) -> Iterator[Recipe]:
    """Yield every method that reduces prefill, alone.

    FitPrune only if its `statistics` are there. `blocks`: number of encoder blocks, 0 for no cuts inside the encoder. `learned`:
    cuts of that method, of any number of tokens.
    """
    for method in method_names():
        if method in (ENCODER, "plphp"):  # ENCODER needs block numbers and follows below; PLPHP does not reduce prefill
            continue
        if not set(parts_needed(method, {}, 1.0)) <= set(() if statistics is None else statistics.parts):
            continue
        for settings in _variants(method):
            yield method, partial(_single_method, method, settings, unpruned, statistics)
    for cut in learned:
        yield "learned", partial(_learned, unpruned, cut)
    for places in encoder_places(blocks):
        for method in (ENCODER, "uniform"):
            yield method, partial(encoder_plan, unpruned, method, places)


def _variants(method: str) -> list[dict[str, Any]]:
    # The defaults, and each option that calibration compares at each of its other values.
    if method in _LAYERS:
        return [{"layer": layer} for layer in _LAYERS[method]]
    declared = options_of(method) if method in METHODS else ()
    return [{}, *({option.name: value} for option in declared for value in option.tries if value != option.default)]


def _single_method(
    method: str, settings: dict[str, Any], unpruned: KeepPlan, statistics: Statistics | None, share: float
) -> KeepPlan:
    return plan_for_budget(method, share, unpruned, statistics, **settings)


def _learned(unpruned: KeepPlan, cut: Cut, share: float) -> KeepPlan:
    return unpruned.with_cuts(replace(cut, keep=keep_count(unpruned.tokens_entering_decoder, share)))


def input_cuts() -> list[Cut]:
    """Return a cut of every input method that may follow vision cuts, in its variants, with a placeholder keep budget of 1."""
    methods = [method for method in INPUT if method not in (*BASELINES, "evs")]
    return [Cut("input", method, 1, options=options) for method in methods for options in _variants(method)]


def later_layers(layers: int) -> list[int]:
    """Return the layers before which the search cuts behind an input cut: all of a shallow decoder, or MOST_LAYERS evenly."""
    places = {round(layers * place / (MOST_LAYERS + 1)) for place in range(1, MOST_LAYERS + 1)}
    return sorted(place for place in places if 0 < place < layers)


def encoder_blocks(blocks: int) -> list[int]:
    """Return the blocks of a vision encoder before which the search cuts; none if the encoder has too few."""
    return sorted({block for part in _ENCODER_DEPTHS if 0 < (block := round(blocks * part)) < blocks})


def encoder_places(blocks: int) -> list[tuple[int, ...]]:
    """Return the combinations of blocks for vision cuts: each block alone, and the first with the last."""
    depths = encoder_blocks(blocks)
    return [*((block,) for block in depths), *([(depths[0], depths[-1])] if len(depths) > 1 else [])]


def encoder_plan(unpruned: KeepPlan, method: str, places: tuple[int, ...], share: float) -> KeepPlan:
    """Return the plan whose vision cuts keep `share` of the tokens in total, with the same keep ratio at every cut."""
    keeps = [encoder_count(unpruned.geometry, share ** (step / len(places)), method) for step in range(1, len(places) + 1)]
    return unpruned.with_cuts(*(Cut("vision", method, keep, block) for keep, block in zip(keeps, places, strict=True)))


@dataclass(frozen=True)
class CandidateComposer:
    """Yields compositions of cuts for a model, given its unpruned plan and statistics."""

    unpruned: KeepPlan
    statistics: Statistics | None

    def inward(self, cut: Cut, *, layer_cuts: bool = True) -> Iterator[PlanFactory]:
        """Yield the input cut weighed, with a smaller image, and with a larger keep budget followed by a withdrawal or a layer cut.

        `layer_cuts`: whether layer cuts that keep tokens are among them, which are most.
        """
        for each in self._weighed(cut):
            yield partial(self._at_input, self._unpruned, each)
        yield partial(self._at_input, self._smaller_image, cut)
        yield from self._with_layer_cuts(self._unpruned, cut, kept=layer_cuts)

    def encoder_first(self, places: tuple[int, ...], cuts: Sequence[Cut]) -> Iterator[PlanFactory]:
        """Yield cuts inside the vision encoder before the blocks `places`, followed by a cut at the input or between layers."""
        for part in (*(partial(_constant, ratio) for ratio in _ENCODER_RATIOS), partial(_root, 2)):  # _root: equal ratios
            base: PlanFactory = partial(self._with_vision_cuts, places, part)
            for cut in cuts:
                yield partial(self._at_input, base, cut)
            for method, settings in _LAYER_METHODS:
                yield partial(self._with_method, base, method, settings)

    def encoder_inward(self, places: tuple[int, ...], cut: Cut) -> Iterator[PlanFactory]:
        """Yield cuts inside the vision encoder before the blocks `places`, at the input, and between layers."""
        yield from self._with_layer_cuts(partial(self._with_vision_cuts, places, partial(_root, 3)), cut)

    def caches(self, cut: Cut | None = None, places: tuple[int, ...] = ()) -> Iterator[PlanFactory]:
        """Yield cache cuts, preceded by vision cuts (`places`) and an input cut (`cut`) if given, with equal keep ratios."""
        sites = 1 + (cut is not None) + bool(places)
        for settings in _CACHE_SETTINGS:
            base: PlanFactory = partial(self._with_vision_cuts, places, partial(_root, sites)) if places else self._unpruned
            if cut is not None:
                base = partial(self._at_input, base, cut, part=lambda share: share ** ((sites - 1) / sites))
            yield partial(self._with_method, base, "plphp", settings)

    def _unpruned(self, share: float) -> KeepPlan:
        return self.unpruned

    def _smaller_image(self, share: float) -> KeepPlan:
        return replace(self.unpruned, geometry=resized(self.unpruned.geometry, 0.5))

    def _with_vision_cuts(self, places: tuple[int, ...], part: Part, share: float) -> KeepPlan:
        return encoder_plan(self.unpruned, ENCODER, places, part(share))

    def _at_input(self, base: PlanFactory, cut: Cut, share: float, part: Part = lambda share: share) -> KeepPlan:
        plan = base(share)
        return plan.with_cuts(
            replace(cut, keep=max(1, min(plan.tokens_entering_decoder, int(part(share) * self.unpruned.geometry.tokens + 1e-9))))
        )

    def _with_method(self, base: PlanFactory, method: str, settings: dict[str, Any], share: float) -> KeepPlan:
        plan = base(share)
        return plan_for_budget(
            method,
            min(1.0, share * self.unpruned.geometry.tokens / plan.tokens_entering_decoder),
            plan,
            self.statistics,
            **settings,
        )

    def _with_layer_cuts(self, base: PlanFactory, cut: Cut, *, kept: bool = True) -> Iterator[PlanFactory]:
        for layer in later_layers(self.unpruned.layers):
            for each in (cut, *self._weighed(cut)):
                yield partial(self._with_withdrawal, base, each, layer)
            for more in _INPUT_FACTORS if kept else ():
                for method in ("fastv", "sparsevlm"):
                    yield partial(self._with_layer_cut, base, cut, method, layer, more)

    @staticmethod
    def _weighed(cut: Cut) -> list[Cut]:
        # The same cut, if its method has the option, with each kept token counting as often as it stands for. What is learned is
        # learned for one or the other.
        can = cut.weights is None and any(option.name == "weigh" for option in options_of(cut.method))
        return [replace(cut, options={**cut.options, "weigh": True})] if can else []

    def _with_withdrawal(self, base: PlanFactory, cut: Cut, layer: int, share: float) -> KeepPlan:
        early = self._at_input(base, cut, share, part=lambda share: share * self.unpruned.layers / layer)
        return early.with_cuts(Cut("layer", "vtw", 0, layer))

    def _with_layer_cut(self, base: PlanFactory, cut: Cut, method: str, layer: int, more: float, share: float) -> KeepPlan:
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
    """Return whether a vision, input or layer cut drops nothing, so that the plan equals one without this cut."""
    alive = plan.geometry.tokens
    for cut in plan.cuts:
        if cut.site in ("vision", "input", "layer"):
            if cut.keep >= alive:
                return True
            alive = cut.keep
    return False
