"""Search for the cheapest plan that still answers like the unpruned model: methods, layers, budgets, compositions, image size.

At one cost, candidates race: all are scored on a few samples, the better half on twice as many, until few are left. Single
methods start; the best of those at the input and inside the vision encoder are then composed with one another and with cuts
further in, at the same total cost, and race against them. What a cut inside the encoder saves there counts where the cost is a
time; the shares of work and of cache are the decoder's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from edgeprune.calibration.allocate.recipes import RESIZE
from edgeprune.calibration.data.statistics import Statistics
from edgeprune.calibration.search.candidates import (
    BASELINES,
    ENCODER,
    CandidateComposer,
    Recipe,
    input_cuts,
    is_noop,
    single_method_candidates,
)
from edgeprune.calibration.search.objectives import Agreement, flops_share, kv_share, predicted_ttft
from edgeprune.calibration.search.pareto import Budget, PlanFactory, Point
from edgeprune.device.profile import DeviceProfile
from edgeprune.errors import PlanError
from edgeprune.families.base import DecoderParts
from edgeprune.plan import KeepPlan

FIRST_ROUND = 24  # samples
ALIKE, FINALISTS = 0.01, 8  # agreement that a few samples cannot tell apart, and how many such plans are looked at closely
PARTNERS = 3  # input methods that go on into compositions
PLACES = 2  # inside the vision encoder, of the cuts that stand first in compositions
Candidate = tuple[str, KeepPlan]  # group and plan


@dataclass
class Search:
    """One search: what is known of the model and what was measured so far. `points`: every plan that reached a last round.

    `blocks`: of a vision encoder whose tokens can leave; without them no cut inside it is tried.
    """

    parts: DecoderParts
    unpruned: KeepPlan
    statistics: Statistics
    agreement: Agreement
    times: DeviceProfile | None
    progress: Callable[[str], None]
    blocks: int = 0

    def __post_init__(self) -> None:
        self.points: list[Point] = []

    def at(self, budget: Budget) -> Point:
        """Return the best plan found within a budget; raise PlanError when there is none."""
        composer = CandidateComposer(self.unpruned, self.statistics)
        first = list(single_method_candidates(self.unpruned, self.statistics, self.blocks))
        if budget.axis == "kv":
            first += [("plphp", make) for make in composer.caches()]
        ranked = self.successive_halving(list(self._affordable(first, budget)))
        composed = [("composed", make) for make in self._compositions(composer, ranked, budget.axis)]
        finalists = [
            *ranked,
            *self.successive_halving([found for found in self._affordable(composed, budget) if not is_noop(found[1])]),
        ]
        finalists = [point for point in finalists if point.cost(budget.axis) <= budget.most + 1e-6]
        if not finalists:
            raise PlanError(f"No plan costs {budget} or less.", hint="Ask for more.")
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

    def successive_halving(self, candidates: list[Candidate]) -> list[Point]:
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
            RESIZE if plan.geometry != self.unpruned.geometry else "none"
        )
        self.progress(f"{name}, {count} samples")
        ttft = None if self.times is None else self._ttft_ms(plan)
        flops, kv = flops_share(self.parts, plan, self.unpruned), kv_share(plan, self.unpruned)
        return Point(name, group, flops, kv, self.agreement.score(plan, count), count, plan, ttft)

    def _ttft_ms(self, plan: KeepPlan) -> float:
        assert self.times is not None
        return predicted_ttft(self.times, plan, max(self.blocks, 1))

    def _compositions(self, composer: CandidateComposer, ranked: list[Point], axis: str) -> Iterator[PlanFactory]:
        partners = [point.plan.input for point in ranked if point.plan.input is not None and point.group not in BASELINES]
        for cut in partners[:PARTNERS]:
            yield from composer.inward(cut)
        # Where no input method is within the budget alone, one may be behind an encoder's cut.
        cuts = partners[:PARTNERS] or input_cuts()
        places = [tuple(cut.layer for cut in point.plan.vision_cuts) for point in ranked if point.group == ENCODER][:PLACES]
        for blocks in places:
            yield from composer.encoder_first(blocks, cuts)
        if places:
            yield from composer.encoder_inward(places[0], cuts[0])
        if axis == "kv":
            yield from (make for cut in cuts for make in composer.caches(cut))
            yield from (make for blocks in places for cut in (None, *cuts[:1]) for make in composer.caches(cut, blocks))

    def _affordable(self, recipes: Iterable[Recipe], budget: Budget) -> Iterator[Candidate]:
        found: list[KeepPlan] = []
        for group, make in recipes:
            try:
                plan = budget.plan(make, self._ttft_ms)
                self.agreement.check(plan)
            except PlanError:
                continue  # this method cannot be that cheap, or not of this model
            if (plan.cuts or plan.geometry != self.unpruned.geometry) and plan not in found:
                found.append(plan)
                yield group, plan
