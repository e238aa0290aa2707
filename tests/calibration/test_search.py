"""Targets and the search: cheaper plans that answer alike win, unreachable targets are told at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from learned_weights import drawn_weights

from edgeprune.calibration.allocate.dyrate import DecodeRateOptions
from edgeprune.calibration.data.samples import BadSampleError, Score
from edgeprune.calibration.data.statistics import Statistics, StatisticsSource
from edgeprune.calibration.search.auto import DropExceededError, check_goal, find_plan, prunable_encoder_blocks
from edgeprune.calibration.search.candidates import BASELINES, encoder_blocks, encoder_places, is_noop
from edgeprune.calibration.search.goal import Goal
from edgeprune.calibration.search.objectives import Agreed
from edgeprune.calibration.search.pareto import Budget, Curve, Point, facts_of, pareto_front
from edgeprune.calibration.search.search import Search
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.device.profile import DeviceProfile
from edgeprune.errors import EdgePruneError, PlanError, UsageError
from edgeprune.io.progress import Count, Silent
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.plan.presets import unpruned_plan

GEOMETRY = Geometry(560, 560, 14, 2)  # 20 x 20
WHOLE = unpruned_plan("qwen2_vl", 3, GEOMETRY)
TIMES = DeviceProfile("somewhere", "measured", 400, 40.0, (10.0, 20.0, 30.0, 40.0, 60.0))


class Judge:
    """Stands in for the model: what plans keep of the last layer is what counts, and only DivPrune chooses well."""

    def __init__(self, count: int = 40) -> None:
        self._count = count
        self.asked: list[int] = []
        self.refused: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self._count

    def check(self, plan: KeepPlan) -> None:
        if any(cut.method in self.refused for cut in plan.cuts):
            raise PlanError("not of this model")

    def score(self, plan: KeepPlan, count: int, progress: Count = lambda done: None, least: float = 0.0) -> Agreed:
        assert not any(cut.method in self.refused for cut in plan.cuts)
        self.asked.append(count)
        skill = 1.0 if any(cut.method == "divprune" for cut in plan.cuts) else 0.5
        return Agreed(min(1.0, skill * (0.6 + plan.tokens_at_layer(2) / 400 * 2)), Score(1, 2, 4))

    def divergences(self, plans: list[KeepPlan], progress: Count = lambda done: None) -> list[float]:
        return [1.0 / (1 + plan.tokens_at_layer(2)) for plan in plans]


def statistics() -> Statistics:
    """Return statistics of one sample, in which nothing differs."""
    source = StatisticsSource("qwen2_vl", 3, 2, "abc", GEOMETRY, "last", "mean", False)
    return Statistics.empty(source).with_sample({name: np.zeros(shape) for name, shape in source.shapes().items()})


def untrained(base: KeepPlan, rate: DecodeRateOptions) -> KeepPlan:
    """Refuse to fit a rate: none was asked for."""
    raise AssertionError(rate)


class Skilled(Judge):
    """To whom all methods are alike: what counts is how many tokens reach the last layer."""

    def score(self, plan: KeepPlan, count: int, progress: Count = lambda done: None, least: float = 0.0) -> Agreed:
        return Agreed(plan.tokens_at_layer(2) / 400 if plan.geometry == GEOMETRY else 0.0)


class Racing(Judge):
    """Leaves a plan as soon as it cannot reach what it has to."""

    def score(self, plan: KeepPlan, count: int, progress: Count = lambda done: None, least: float = 0.0) -> Agreed:
        agreed = super().score(plan, count, progress)
        return replace(agreed, complete=agreed.mean >= least)


def search(tiny: LoadedModel, judge: Judge, blocks: int = 0, times: DeviceProfile | None = None) -> Search:
    return Search(tiny.family.decoder(), WHOLE, statistics(), judge, times, Silent(), blocks)  # type: ignore[arg-type]


def test_cuts_inside_the_encoder_are_tried_at_several_blocks(tiny: LoadedModel) -> None:
    assert encoder_blocks(12) == [4, 6, 8] and encoder_places(12) == [(4,), (6,), (8,), (4, 8)]
    assert encoder_blocks(2) == [1] and encoder_places(2) == [(1,)]
    assert encoder_blocks(1) == encoder_blocks(0) == []
    looking = search(tiny, Judge(), blocks=12)
    looking.at(Budget("flops", 0.5))
    assert any(point.group == "evit" and point.samples == 40 for point in looking.points)


def test_no_cut_is_tried_where_no_token_can_leave_the_encoder(tiny: LoadedModel) -> None:
    looking = search(tiny, Judge())
    looking.at(Budget("flops", 0.5))
    assert not any(point.plan.vision_cuts for point in looking.points)


def behind_the_encoder(looking: Search) -> set[tuple[str, ...]]:
    return {
        tuple(dict.fromkeys(cut.site for cut in point.plan.cuts))
        for point in looking.points
        if point.plan.vision_cuts and point.group == "composed"
    }


@pytest.mark.parametrize("axis", ["flops", "kv"])
def test_a_cut_inside_the_encoder_stands_before_the_others(tiny: LoadedModel, axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.calibration.search.search.FIRST_ROUND", 40)  # all candidates reach the last round
    looking = search(tiny, Judge(), blocks=12)
    looking.at(Budget(axis, 0.4))
    expected = {("vision", "input"), ("vision", "layer"), ("vision", "input", "layer")}
    expected |= {("vision", "cache"), ("vision", "input", "cache")} if axis == "kv" else set()
    assert behind_the_encoder(looking) == expected
    composed = [point for point in looking.points if point.group == "composed"]
    assert not any(is_noop(point.plan) for point in composed)
    counted = KeepPlan.tokens_at_layer if axis == "flops" else KeepPlan.tokens_cached
    means = [sum(counted(point.plan, layer) for layer in range(3)) / 1200 for point in composed if point.plan.vision_cuts]
    # The same cost, up to whole tokens; PLPHP's classes need statistics that are more than zeros.
    assert all(0.38 < mean <= 0.4 + 1 / 400 for mean in means if axis == "flops" or mean < 0.46) and len(means) > 40


def test_where_the_encoder_is_most_of_the_time_tokens_leave_inside_it(tiny: LoadedModel) -> None:
    slow = DeviceProfile("somewhere", "measured", 400, 90.0, (2.0, 4.0, 6.0, 8.0, 10.0))
    looking = search(tiny, Judge(), blocks=12, times=slow)
    found = looking.at(Budget("ttft_ms", 70.0))  # which no cut behind the encoder reaches
    assert found.plan.vision_cuts and found.ttft_ms is not None and found.ttft_ms <= 70.0
    assert {point.group for point in looking.points if point.cost("ttft_ms") <= 70.0} <= {"evit", "uniform", "resize", "composed"}
    assert "divprune" in found.name  # which this judge wants, and which is not affordable alone
    assert looking.at(Budget("ttft_ms", 95.0)).plan.vision_cuts == ()  # where it is, nothing leaves inside the encoder


def test_what_leaves_inside_the_encoder_lets_more_stay_in_the_same_time(tiny: LoadedModel) -> None:
    even = DeviceProfile("somewhere", "measured", 400, 50.0, (10.0, 20.0, 30.0, 40.0, 50.0))
    looking = search(tiny, Skilled(), blocks=12, times=even)
    found = looking.at(Budget("ttft_ms", 70.0))
    alone = [point for point in looking.points if not point.plan.vision_cuts and point.cost("ttft_ms") <= 70.0]
    assert found.plan.vision_cuts and found.score > max(point.score for point in alone)


def test_the_best_method_wins_at_its_cost(tiny: LoadedModel) -> None:
    found = search(tiny, Judge()).at(Budget("flops", 0.5))
    assert found.group in ("divprune", "composed") and "divprune" in found.name
    assert found.flops <= 0.5 and found.samples == 40


def test_what_cannot_win_is_left(tiny: LoadedModel) -> None:
    whole, racing = search(tiny, Judge(), blocks=12), search(tiny, Racing(), blocks=12)
    assert racing.at(Budget("flops", 0.5)) == whole.at(Budget("flops", 0.5))
    assert {point.group for point in racing.points} == {point.group for point in whole.points}
    assert len(racing.agreement.asked) < len(whole.agreement.asked)  # type: ignore[attr-defined]


def test_a_size_that_an_image_does_not_fit_is_left_out(tiny: LoadedModel) -> None:
    class Picky(Judge):
        where: tuple[Geometry, ...] = ()  # that no image fits

        def score(self, plan: KeepPlan, count: int, progress: Count = lambda done: None, least: float = 0.0) -> Agreed:
            if plan.geometry in self.where:
                raise BadSampleError("samples.jsonl:2: another shape")
            return super().score(plan, count, progress, least)

    looking, picky = search(tiny, Judge()), Picky()
    found = looking.at(Budget("flops", 0.5))
    picky.where = tuple({point.plan.geometry for point in looking.points} - {GEOMETRY})
    assert picky.where and search(tiny, picky).at(Budget("flops", 0.5)) == found
    picky.where = (GEOMETRY,)
    with pytest.raises(BadSampleError):
        search(tiny, picky).at(Budget("flops", 0.5))


def test_plans_that_agree_alike_are_told_apart_by_divergence(tiny: LoadedModel) -> None:
    looking = search(tiny, Judge())
    plans = [WHOLE.with_cuts(Cut("input", "divprune", keep)) for keep in (250, 300, 350)]
    level = [Point("p", "divprune", 0.5, 0.5, score, 40, plan) for score, plan in zip((0.995, 0.99, 0.9), plans, strict=True)]
    assert looking._closest(level) is level[1]
    composed = plans[1].with_cuts(Cut("layer", "fastv", 299, layer=1))
    level.append(Point("p", "composed", 0.5, 0.5, 0.999, 40, composed))
    assert looking._closest(level) is level[1]  # not better by more than a few samples can tell, so the simpler one
    looking.agreement.divergences = None  # type: ignore[assignment]
    assert looking._closest(level[2:3]) is level[2]  # nothing to tell it apart from


def test_every_method_is_measured_on_every_sample(tiny: LoadedModel) -> None:
    looking = search(tiny, Judge())
    looking.at(Budget("flops", 0.5))
    found = {point.group for point in looking.points if point.samples == 40}
    assert found >= {*BASELINES, "divprune", "zspaprune", "visionzip", "fastv", "composed"}


def test_caches_are_searched_too(tiny: LoadedModel) -> None:
    looking = search(tiny, Judge())
    found = looking.at(Budget("kv", 0.4))
    assert found.kv <= 0.4 + 1e-6
    assert any(point.group == "plphp" for point in looking.points)


def test_an_allowed_drop_finds_the_cheapest(tiny: LoadedModel) -> None:
    plan, curve = find_plan(tiny, statistics(), untrained, Judge(), WHOLE, Goal(0.05), None, Silent())  # type: ignore[arg-type]
    assert curve.chosen is not None
    chosen = curve.points[curve.chosen]
    assert chosen.plan == plan and chosen.score >= 0.95
    cheaper = [point for point in curve.points if point.samples == 40 and point.flops < chosen.flops - 0.03]
    assert all(point.score < 0.95 for point in cheaper)


def test_too_much_is_refused_with_the_curve(tiny: LoadedModel) -> None:
    with pytest.raises(DropExceededError, match=r"loses .* more than 1.0%") as error:
        find_plan(tiny, statistics(), untrained, Judge(), WHOLE, Goal(0.01, flops=0.1), None, Silent())  # type: ignore[arg-type]
    assert error.value.curve.points


def test_an_unreachable_latency_is_told_at_once(tiny: LoadedModel) -> None:
    judge = Judge()
    # Of two blocks the second may see one token of 400: 40 * 401 / 800, and 10 for a prefill without any.
    with pytest.raises(EdgePruneError, match=r"pruning cannot pass 3.3x here, to 30.0 ms .*vision encoder is 40% of 100.0 ms"):
        find_plan(tiny, statistics(), untrained, judge, WHOLE, Goal(0.01, ttft_ms=30.0), TIMES, Silent())  # type: ignore[arg-type]
    assert not judge.asked


def test_where_no_token_can_leave_the_encoder_all_of_it_is_to_be_waited_for(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prunable_encoder_blocks(tiny, WHOLE) == 2
    monkeypatch.setattr(type(tiny.family), "no_encoder_cuts_reason", "its encoder merges on the way")
    assert prunable_encoder_blocks(tiny, WHOLE) == 0
    with pytest.raises(EdgePruneError, match=r"pruning cannot pass 2.0x here, to 50.0 ms"):
        check_goal(Goal(0.01, ttft_ms=45.0), tiny, WHOLE, TIMES, 40)


def test_a_latency_needs_a_device(tiny: LoadedModel) -> None:
    with pytest.raises(UsageError, match="needs a device"):
        check_goal(Goal(0.01, ttft_ms=80.0), tiny, WHOLE, None, 40)


def test_a_goal_becomes_budgets() -> None:
    assert Goal(0.01, kv=0.3).budgets == (Budget("kv", 0.3),)
    assert Goal(0.01, ttft_ms=80.0).budgets == (Budget("ttft_ms", 80.0),)
    assert [budget.most for budget in Goal(0.01).budgets] == [0.75, 0.5, 0.35, 0.25, 0.15, 0.1]


def test_a_latency_that_costs_too_much_is_refused_in_milliseconds(tiny: LoadedModel) -> None:
    with pytest.raises(DropExceededError, match=r"best plan at 35\.0 ms to the first token loses") as error:
        find_plan(tiny, statistics(), untrained, Judge(), WHOLE, Goal(0.01, ttft_ms=35.0), TIMES, Silent())  # type: ignore[arg-type]
    assert error.value.curve.axis == "ttft_ms" and error.value.curve.points


def test_goals_are_checked() -> None:
    for words, wrong in {
        "one target": {"flops": 0.5, "kv": 0.5},
        "at most 1": {"flops": 1.5},
        "above 0": {"kv": 0.0},
    }.items():
        with pytest.raises(UsageError, match=words):
            Goal(0.01, **wrong)


def test_few_samples_cannot_judge(tiny: LoadedModel) -> None:
    with pytest.raises(UsageError, match="needs 20 samples"):
        find_plan(tiny, statistics(), untrained, Judge(5), WHOLE, Goal(0.01, flops=0.5), None, Silent())  # type: ignore[arg-type]


def point(flops: float, score: float) -> Point:
    return Point("p", "fastv", flops, flops, score, 40, WHOLE)


def test_the_front_by_hand() -> None:
    points = [point(0.5, 0.9), point(0.2, 0.7), point(0.3, 0.6), point(0.5, 0.95), point(0.9, 0.95)]
    assert [(p.flops, p.score) for p in pareto_front(points, "flops")] == [(0.2, 0.7), (0.5, 0.95)]


def test_curves_survive(tmp_path: Path) -> None:
    curve = Curve("flops", (point(0.5, 0.9), point(0.2, 0.7)), 1)
    curve.save(tmp_path / "c.json")
    assert Curve.load(tmp_path / "c.json") == curve
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(UsageError):
        Curve.load(tmp_path / "c.json")


def test_a_point_knows_the_facts_of_descriptions(tmp_path: Path) -> None:
    found = replace(point(0.5, 0.9), precision=0.5, recall=0.25)
    assert found.f1 == pytest.approx(1 / 3) and point(0.5, 0.9).f1 is None
    assert (replace(found, precision=0.0, recall=0.0).f1, facts_of(Score())) == (0.0, (None, None))
    assert facts_of(Score(1, 2, 4)) == (0.5, 0.25)
    Curve("flops", (found,)).save(tmp_path / "c.json")
    assert Curve.load(tmp_path / "c.json").points == (found,)


def test_the_search_keeps_the_facts_of_every_point(tiny: LoadedModel) -> None:
    _, curve = find_plan(tiny, statistics(), untrained, Judge(), WHOLE, Goal(1.0, flops=0.5), None, Silent())  # type: ignore[arg-type]
    assert {(found.precision, found.recall) for found in curve.points} == {(0.5, 0.25)}


def test_times_survive(tmp_path: Path) -> None:
    TIMES.save(tmp_path / "t.json")
    assert DeviceProfile.load(tmp_path / "t.json") == TIMES
    (tmp_path / "t.json").write_text('{"schema_version": 1}')
    with pytest.raises(UsageError, match="edgeprune profile"):
        DeviceProfile.load(tmp_path / "t.json")


def test_what_is_not_of_the_model_is_left_out_and_tiles_are_not_resized(tiny: LoadedModel) -> None:
    judge = Judge()
    judge.refused = ("visionzip", "fastv")
    found = search(tiny, judge)
    found.unpruned = replace(WHOLE, geometry=replace(GEOMETRY, views=GEOMETRY.layout))
    assert found.at(Budget("flops", 0.3)).plan.cuts
    assert {point.plan.geometry for point in found.points} == {found.unpruned.geometry}


class Taught(Judge):
    """To whom only what was learned chooses well."""

    def score(self, plan: KeepPlan, count: int, progress: Count = lambda done: None, least: float = 0.0) -> Agreed:
        skill = 1.0 if plan.weights else 0.5
        return Agreed(min(1.0, skill * (0.6 + plan.tokens_at_layer(2) / 400 * 2)), Score(1, 2, 4))


def test_what_was_learned_is_a_candidate_alone_and_in_compositions(tiny: LoadedModel) -> None:
    looking = search(tiny, Taught())
    plain, weighing = drawn_weights(48, (40, 200)), drawn_weights(48, (200, 200))
    cut = Cut("input", "learned", 1, weights=plain)
    looking.learned = cut, replace(cut, options={"weigh": True}, weights=weighing)
    found = looking.at(Budget("flops", 0.5))
    assert "learned" in found.name and found.plan.weights in ([plain], [weighing])
    assert {"learned", "composed"} <= {point.group for point in looking.points if point.plan.weights}
    for point in looking.points:  # each is weighed, or not, as it was learned
        if point.plan.weights:
            assert point.plan.weighs == (point.plan.weights == [weighing])
    without = search(tiny, Taught())
    without.at(Budget("flops", 0.5))
    assert not any(point.plan.weights for point in without.points)
