"""Search for the plan of a given cost that agrees best with the unpruned model: methods, layers, budgets, compositions, image size.

Candidates of the same cost go through successive halving: all are scored on a few samples, the better half on twice as many, and
so on. A candidate is left as soon as it cannot reach the better half. Single methods come first. The best input and encoder
methods are then composed with each other and with later cuts at the same total cost, and compete in a second round, in which
whatever cannot reach the best single method, but for one answer, is left at once. Savings inside the vision encoder count only if
the cost is a time: the shares of work and of cache cover the decoder alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from edgeprune.calibration.allocate.recipes import RESIZE
from edgeprune.calibration.data.samples import BadSampleError
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
from edgeprune.calibration.search.pareto import Budget, PlanFactory, Point, facts_of
from edgeprune.device.profile import DeviceProfile
from edgeprune.errors import PlanError
from edgeprune.families.base import DecoderParts
from edgeprune.io.progress import Count, Progress
from edgeprune.plan import Cut, KeepPlan

FIRST_ROUND = 24  # samples; with 8 of them, chance left out the best of 99 plans that kept a ninth of the tokens
SCORE_TOLERANCE = 0.01  # difference in agreement that few samples cannot resolve
FINALISTS = 8  # plans within the tolerance that are compared by divergence
PARTNERS = 3  # input methods that enter compositions
ENCODER_PARTNERS = 2  # placements of vision cuts that enter compositions
Candidate = tuple[str, KeepPlan]  # group and plan


@dataclass
class Search:
    """One search and its measurements so far. `points`: every plan that was scored on all samples.

    `blocks`: number of blocks of a vision encoder that supports cuts, 0 for no cuts inside it. `learned`: cuts of that method, of
    any number of tokens, which are candidates.
    """

    parts: DecoderParts
    unpruned: KeepPlan
    statistics: Statistics | None
    agreement: Agreement
    times: DeviceProfile | None
    progress: Progress
    blocks: int = 0
    learned: Sequence[Cut] = ()

    def __post_init__(self) -> None:
        self.points: list[Point] = []

    def at(self, budget: Budget) -> Point:
        """Return the best plan found within a budget; raise PlanError if there is none."""
        composer = CandidateComposer(self.unpruned, self.statistics)
        single = list(single_method_candidates(self.unpruned, self.statistics, self.blocks, self.learned))
        if budget.axis == "kv":
            single += [("plphp", make) for make in composer.caches()]
        ranked = self.successive_halving(list(self._affordable(single, budget)), "single methods")
        composed = [("composed", make) for make in self._compositions(composer, ranked, budget.axis)]
        combinations = [item for item in self._affordable(composed, budget) if not is_noop(item[1])]
        best = next((point for point in ranked if point.group not in BASELINES), None)
        finalists = [*ranked, *self.successive_halving(combinations, "combinations", best)]
        finalists = [point for point in finalists if point.cost(budget.axis) <= budget.most + 1e-6]
        if not finalists:
            raise PlanError(f"No plan costs {budget} or less.", hint="Ask for more.")
        return self._closest(finalists)

    def _closest(self, finalists: list[Point]) -> Point:
        # Few samples cannot distinguish plans of similar agreement. Among them, the fewest cuts win, since a composition may
        # overfit the samples; then the lowest divergence wins.
        best = max(finalists, key=lambda point: (point.samples, point.score))
        tied = [point for point in finalists if point.samples == best.samples and point.score >= best.score - SCORE_TOLERANCE]
        fewest = min(len(point.plan.cuts) for point in tied)
        tied = sorted((point for point in tied if len(point.plan.cuts) == fewest), key=lambda point: -point.score)[:FINALISTS]
        if len(tied) == 1:
            return tied[0]
        counted = self.progress.count(f"comparing {len(tied)} plans of equal agreement, samples", len(self.agreement))
        divergences = self.agreement.divergences([point.plan for point in tied], counted)
        return tied[divergences.index(min(divergences))]

    def successive_halving(self, candidates: list[Candidate], what: str, rival: Point | None = None) -> list[Point]:
        """Return the candidates of the last round, scored on all samples, best first; the best of every group stays to the end.

        `what`: names the candidates in the progress, whose total is the answers that they take at most. `rival`: a plan that they
        have to reach, but for one answer.
        """
        count, remaining = min(FIRST_ROUND, len(self.agreement)), candidates
        total = self._most_answers(len(candidates), len({group for group, _ in candidates}), count)
        counted = self.progress.count(f"trying {len(candidates)} {what}, answers at most", total)
        while True:
            rest = self._most_answers(len(remaining), len({group for group, _ in remaining}), count)
            points = self._round(remaining, count, rival, counted, total - rest)
            if count == len(self.agreement):
                break
            half = points[: max(PARTNERS, len(points) // 2)]
            best = {point.group: point for point in reversed(points)}  # the curve shows every group
            remaining = [(point.group, point.plan) for point in (*half, *(p for p in best.values() if p not in half))]
            count = min(2 * count, len(self.agreement))
        self.points += points
        return points

    def _round(self, candidates: list[Candidate], count: int, rival: Point | None, counted: Count, before: int) -> list[Point]:
        # The candidates that were scored on `count` samples, best first. `before`: the answers that are already counted.
        half = max(PARTNERS, len(candidates) // 2)
        floor = 0.0 if rival is None else self.agreement.score(rival.plan, count).mean - 1 / count
        points: list[Point] = []
        for index, (group, plan) in enumerate(candidates):
            worst = points[half - 1].score if len(points) >= half else 0.0
            # The first of each group is scored in any case: the curve shows it.
            least = max(floor, worst) if any(point.group == group for point in points) else 0.0
            begun = before + index * count
            point = self._measure(group, plan, count, partial(_count_on, counted, begun), least)
            counted(begun + count)
            if point is not None:
                points.append(point)
                points.sort(key=lambda point: -point.score)
        return points

    def _most_answers(self, plans: int, groups: int, count: int) -> int:
        # The answers that a round and all later ones take, if every round keeps the best of each group beside its better half.
        answers = plans * count
        while count < len(self.agreement):
            plans = min(plans, max(PARTNERS, plans // 2) + groups)
            count = min(2 * count, len(self.agreement))
            answers += plans * count
        return answers

    def _measure(self, group: str, plan: KeepPlan, count: int, counted: Count, least: float) -> Point | None:
        # None if the plan cannot reach the score `least`, or is of a size that an image does not fit.
        try:
            agreed = self.agreement.score(plan, count, counted, least)
        except BadSampleError:
            if plan.geometry == self.unpruned.geometry:
                raise
            return None  # an image that fits, but not in this size
        if not agreed.complete:
            return None
        name = " + ".join(dict.fromkeys(cut.method for cut in plan.cuts)) or (
            RESIZE if plan.geometry != self.unpruned.geometry else "none"
        )
        ttft = None if self.times is None else self._ttft_ms(plan)
        flops, kv = flops_share(self.parts, plan, self.unpruned), kv_share(plan, self.unpruned)
        return Point(name, group, flops, kv, agreed.mean, count, plan, ttft, *facts_of(agreed.facts))

    def _ttft_ms(self, plan: KeepPlan) -> float:
        assert self.times is not None
        return predicted_ttft(self.times, plan, max(self.blocks, 1))

    def _compositions(self, composer: CandidateComposer, ranked: list[Point], axis: str) -> Iterator[PlanFactory]:
        partners = [point.plan.input for point in ranked if point.plan.input is not None and point.group not in BASELINES]
        for number, cut in enumerate(partners[:PARTNERS]):
            yield from composer.inward(cut, layer_cuts=number == 0)
        # If no input method meets the budget alone, one may meet it after a cut inside the encoder.
        cuts = partners[:PARTNERS] or input_cuts()
        encoder_points = [point for point in ranked if point.group == ENCODER][:ENCODER_PARTNERS]
        placements = [tuple(cut.layer for cut in point.plan.vision_cuts) for point in encoder_points]
        for blocks in placements:
            yield from composer.encoder_first(blocks, cuts)
        if placements:
            yield from composer.encoder_inward(placements[0], cuts[0])
        if axis == "kv":
            yield from (make for cut in cuts for make in composer.caches(cut))
            yield from (make for blocks in placements for cut in (None, *cuts[:1]) for make in composer.caches(cut, blocks))

    def _affordable(self, recipes: Iterable[Recipe], budget: Budget) -> Iterator[Candidate]:
        plans: list[KeepPlan] = []
        for group, make in recipes:
            try:
                plan = budget.plan(make, self._ttft_ms)
                self.agreement.check(plan)
            except PlanError:
                continue  # the method cannot be that cheap, or the model does not support it
            if (plan.cuts or plan.geometry != self.unpruned.geometry) and plan not in plans:
                plans.append(plan)
                yield group, plan


def _count_on(counted: Count, before: int, done: int) -> None:
    counted(before + done)
