"""Search for the cheapest plan that still answers like the unpruned model: methods, layers, budgets, compositions, image size.

At one cost, candidates race: all are scored on a few samples, the better half on twice as many, until few are left. Single
methods start; the best of the input methods are then composed with cuts further in, at the same total cost, and race against
them. A cut inside the vision encoder races at what it costs the decoder; what it saves in the encoder comes on top, and shows in
the predicted time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from edgeprune.calibration.agreement import Agreement
from edgeprune.calibration.costs import flops_share, kv_share, predicted_ttft
from edgeprune.calibration.pareto import Point
from edgeprune.calibration.recipes import RESIZE, method_names, plan_at, resized
from edgeprune.calibration.statistics import Statistics
from edgeprune.errors import PlanError
from edgeprune.families.base import DecoderParts
from edgeprune.plan import Cut, KeepPlan
from edgeprune.runtime.profiling import DeviceTimes

FIRST_ROUND = 24  # samples
ALIKE, FINALISTS = 0.01, 8  # agreement that a few samples cannot tell apart, and how many such plans are looked at closely
PARTNERS = 3  # input methods that go on into compositions
BASELINES = ("random", "uniform", RESIZE)
_VARIANTS: dict[str, list[dict[str, Any]]] = {
    "zspaprune": [{"core": 0.0}, {"core": 0.15}, {"core": 0.3}, {"core": 0.5}, {"core": 0.3, "relevance": "max"}],
    "cdpruner": [{"weight": 0.2}, {"weight": 0.5}, {"weight": 0.8}],
    "fastv": [{"layer": 1}, {"layer": 2}, {"layer": 3}],
}
_ENCODER_PARTS = (1 / 3, 1 / 2, 2 / 3)  # of the encoder's blocks, before which tokens may leave
_CACHE_VARIANTS: list[dict[str, Any]] = [
    {"allocate": allocate, "prior": prior} for allocate in ("classes", "least-cost", "even") for prior in (False, True)
]
Candidate = tuple[str, KeepPlan]  # group and plan


@dataclass
class Search:
    """One search: what is known of the model and what was measured so far. `points`: every plan that reached a last round.

    `blocks`: of the vision encoder; without them no cut inside it is tried.
    """

    parts: DecoderParts
    whole: KeepPlan
    statistics: Statistics
    agreement: Agreement
    times: DeviceTimes | None
    progress: Callable[[str], None]
    blocks: int = 0

    def __post_init__(self) -> None:
        self.points: list[Point] = []

    def at(self, share: float, axis: str) -> Point:
        """Return the best plan found whose cost along "flops" or "kv" is at most `share`; raise PlanError when there is none."""
        singles = [*self._singles(share), *(self._cache_cuts(self.whole, share) if axis == "kv" else ())]
        ranked = self.race(singles)
        partners = [point for point in ranked if point.plan.input is not None and point.group not in BASELINES][:PARTNERS]
        composed = [candidate for point in partners for candidate in self._compositions(point, share)]
        if axis == "kv":
            composed += [candidate for point in partners for candidate in self._cached(point, share)]
        finalists = [point for point in (*ranked, *self.race(composed)) if point.cost(axis) <= share + 1e-6]
        if not finalists:
            raise PlanError(f"No plan costs {share:.0%} or less ({axis}).", hint="Ask for more.")
        return self._closest(finalists)

    def _closest(self, finalists: list[Point]) -> Point:
        # Among those that agree about as well, which a few samples cannot tell apart, the simplest: what is composed to fit them
        # best may fit nothing else. Then the one whose distributions are nearest.
        best = max(finalists, key=lambda point: (point.samples, point.score))
        level = [point for point in finalists if point.samples == best.samples and point.score >= best.score - ALIKE]
        fewest = min(len(point.plan.cuts) for point in level)
        level = sorted((point for point in level if len(point.plan.cuts) == fewest), key=lambda point: -point.score)[:FINALISTS]
        self.progress(f"retelling, {len(level)} plans")
        distances = self.agreement.divergences([point.plan for point in level])
        return level[distances.index(min(distances))]

    def race(self, candidates: list[Candidate]) -> list[Point]:
        """Return the candidates measured, the best first; the last ones left, one of every method, are scored on every sample."""
        count, running = min(FIRST_ROUND, len(self.agreement)), candidates
        while True:
            points = sorted((self._measure(*candidate, count) for candidate in running), key=lambda point: -point.score)
            if count == len(self.agreement):
                break
            half = points[: max(PARTNERS, len(points) // 2)]
            best = {point.group: point for point in reversed(points)}  # of every method, so that the curve shows them all
            running = [(point.group, point.plan) for point in (*half, *(p for p in best.values() if p not in half))]
            count = min(2 * count, len(self.agreement))
        self.points += points
        return points

    def _measure(self, group: str, plan: KeepPlan, count: int) -> Point:
        name = " + ".join(dict.fromkeys(cut.method for cut in plan.cuts)) or (
            RESIZE if plan.geometry != self.whole.geometry else "none"
        )
        self.progress(f"{name}, {count} samples")
        ttft = None if self.times is None else predicted_ttft(self.times, plan, max(self.blocks, 1))
        flops, kv = flops_share(self.parts, plan, self.whole), kv_share(plan, self.whole)
        return Point(name, group, flops, kv, self.agreement.score(plan, count), count, plan, ttft)

    def _singles(self, share: float) -> Iterator[Candidate]:
        for method in method_names():
            if method == "plphp":
                continue  # leaves prefill as it is
            for settings in self._variants(method):
                yield from self._possible(method, partial(plan_at, method, share, self.whole, self.statistics, **settings))

    def _variants(self, method: str) -> list[dict[str, Any]]:
        if method != "evit":
            return _VARIANTS.get(method, [{}])
        return [{"layer": block} for block in sorted({round(self.blocks * part) for part in _ENCODER_PARTS}) if block > 0]

    def _compositions(self, point: Point, share: float) -> Iterator[Candidate]:
        # Keep more at the input, and make up for it further in: the rest withdrawn, or ranked by attention. Or a smaller image.
        cut, tokens, layers = point.plan.input, self.whole.geometry.tokens, self.whole.layers
        assert cut is not None
        yield from self._possible(
            "composed", lambda: replace(self.whole, geometry=resized(self.whole.geometry, 0.5)).with_cuts(cut)
        )
        for layer in range(1, layers):
            whole = int(share * tokens * layers / layer)
            if whole <= tokens:
                early = self.whole.with_cuts(replace(cut, keep=max(1, whole)))
                yield from self._possible("composed", partial(early.with_cuts, Cut("layer", "vtw", 0, layer)))
            for more in (1.25, 1.6, 2.2):
                first = int(more * share * tokens)
                rest = int((share * tokens * layers - first * layer) / (layers - layer))
                if 0 < rest < first <= tokens:
                    early = self.whole.with_cuts(replace(cut, keep=first))
                    for method in ("fastv", "sparsevlm"):
                        yield from self._possible("composed", partial(early.with_cuts, Cut("layer", method, rest, layer)))

    def _cache_cuts(self, base: KeepPlan, share: float) -> Iterator[Candidate]:
        for settings in _CACHE_VARIANTS:
            yield from self._possible(
                "plphp" if not base.cuts else "composed", partial(plan_at, "plphp", share, base, self.statistics, **settings)
            )

    def _cached(self, point: Point, share: float) -> Iterator[Candidate]:
        # Half the saving at the input, the rest from the caches.
        assert point.plan.input is not None
        kept = share**0.5
        base = self.whole.with_cuts(replace(point.plan.input, keep=max(1, int(kept * self.whole.geometry.tokens))))
        yield from self._cache_cuts(base, share / kept)

    def _possible(self, group: str, make: Callable[[], KeepPlan]) -> Iterator[Candidate]:
        try:
            plan = make()
            self.agreement.check(plan)
        except PlanError:
            return  # this method cannot be that cheap, or not of this model
        if plan.cuts or plan.geometry != self.whole.geometry:
            yield group, plan
