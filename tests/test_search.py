"""Costs, targets and the search: cheaper plans that answer alike win, unreachable targets are told at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeprune.calibration.auto import DropExceededError, Goal, _target_share, find_plan
from edgeprune.calibration.costs import flops_share, kv_share, predicted_ttft, roofline_times
from edgeprune.calibration.pareto import Curve, Point, pareto_front
from edgeprune.calibration.planning import ranked_plan, unpruned_plan
from edgeprune.calibration.search import BASELINES, Search
from edgeprune.calibration.statistics import Source, Statistics
from edgeprune.device.modules import MODULES
from edgeprune.errors import EdgePruneError, PlanError, UsageError
from edgeprune.loading import LoadedModel
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.runtime.profiling import DeviceTimes

GEOMETRY = Geometry(560, 560, 14, 2)  # 20 x 20
WHOLE = unpruned_plan("qwen2_vl", 3, GEOMETRY)
TIMES = DeviceTimes("somewhere", "measured", 400, 40.0, (10.0, 20.0, 30.0, 40.0, 60.0))


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

    def score(self, plan: KeepPlan, count: int) -> float:
        assert not any(cut.method in self.refused for cut in plan.cuts)
        self.asked.append(count)
        skill = 1.0 if any(cut.method == "divprune" for cut in plan.cuts) else 0.5
        return min(1.0, skill * (0.6 + plan.alive(2) / 400 * 2))

    def divergences(self, plans: list[KeepPlan]) -> list[float]:
        return [1.0 / (1 + plan.alive(2)) for plan in plans]


class Ready:
    """A calibration whose statistics are there."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    def statistics(self) -> Statistics:
        source = Source("qwen2_vl", 3, 2, "abc", GEOMETRY, "last", "mean", False)
        values: dict[str, Any] = {name: 0.0 for name in source.shapes()}
        import numpy as np

        return Statistics.empty(source).with_sample(
            {name: np.zeros(shape) + values[name] for name, shape in source.shapes().items()}
        )


def search(tiny: LoadedModel, judge: Judge) -> Search:
    return Search(tiny.family.decoder(), WHOLE, Ready(tiny).statistics(), judge, None, lambda what: None)  # type: ignore[arg-type]


def test_flops_follow_the_living_tokens(tiny: LoadedModel) -> None:
    parts = tiny.family.decoder()
    half = WHOLE.with_cuts(Cut("input", "random", 200))
    assert 0.3 < flops_share(parts, half, WHOLE) < 0.5  # attention falls with the square
    late = WHOLE.with_cuts(Cut("layer", "fastv", 200, layer=2))
    assert flops_share(parts, half, WHOLE) < flops_share(parts, late, WHOLE) < 1.0
    assert flops_share(parts, WHOLE.with_cuts(Cut("layer", "vtw", 0, layer=1)), WHOLE) == pytest.approx(1 / 3)


def test_kv_counts_what_is_stored() -> None:
    assert kv_share(ranked_plan(WHOLE, [100, 200, 300]), WHOLE) == 0.5


def test_ttft_adds_up_by_hand() -> None:
    assert predicted_ttft(TIMES, WHOLE) == 100.0
    # Layer 0 with all tokens (60), the others with half (30): 40 + 40.
    assert predicted_ttft(TIMES, WHOLE.with_cuts(Cut("layer", "fastv", 200, layer=1))) == pytest.approx(80.0)


def test_a_cut_inside_the_encoder_saves_blocks_and_prefill() -> None:
    # Of two blocks the second sees half (40 * 3 / 4), and so does every layer (30).
    assert predicted_ttft(TIMES, WHOLE.with_cuts(Cut("vision", "evit", 200, layer=1)), blocks=2) == pytest.approx(60.0)


def test_cuts_inside_the_encoder_are_tried_at_several_blocks(tiny: LoadedModel) -> None:
    looking = search(tiny, Judge())
    assert looking._variants("evit") == []  # how deep the encoder is, is not known
    looking.blocks = 12
    assert [settings["layer"] for settings in looking._variants("evit")] == [4, 6, 8]
    looking.at(0.5, "flops")
    assert any(point.group == "evit" and point.samples == 40 for point in looking.points)


def test_the_roofline_knows_its_devices(tiny: LoadedModel) -> None:
    times = roofline_times(tiny, Geometry(84, 112, 14, 2), "orin-nano")
    assert times.how == "roofline" and times.ttft_ms > 0
    assert list(times.prefill_ms) == sorted(times.prefill_ms)
    faster = roofline_times(tiny, Geometry(84, 112, 14, 2), "thor")
    assert faster.ttft_ms < times.ttft_ms
    with pytest.raises(UsageError, match="orin-nano"):
        roofline_times(tiny, GEOMETRY, "toaster")
    assert {"agx-orin", "orin-nano", "orin-nx", "thor"} <= set(MODULES)


def test_the_best_method_wins_at_its_cost(tiny: LoadedModel) -> None:
    found = search(tiny, Judge()).at(0.5, "flops")
    assert found.group in ("divprune", "composed") and "divprune" in found.name
    assert found.flops <= 0.5 and found.samples == 40


def test_plans_that_agree_alike_are_told_apart_by_divergence(tiny: LoadedModel) -> None:
    looking = search(tiny, Judge())
    plans = [WHOLE.with_cuts(Cut("input", "divprune", keep)) for keep in (250, 300, 350)]
    level = [Point("p", "divprune", 0.5, 0.5, score, 40, plan) for score, plan in zip((0.995, 0.99, 0.9), plans, strict=True)]
    assert looking._closest(level) is level[1]
    composed = plans[1].with_cuts(Cut("layer", "fastv", 299, layer=1))
    level.append(Point("p", "composed", 0.5, 0.5, 0.999, 40, composed))
    assert looking._closest(level) is level[1]  # not better by more than a few samples can tell, so the simpler one


def test_every_method_is_measured_on_every_sample(tiny: LoadedModel) -> None:
    looking = search(tiny, Judge())
    looking.at(0.5, "flops")
    found = {point.group for point in looking.points if point.samples == 40}
    assert found >= {*BASELINES, "divprune", "zspaprune", "visionzip", "fastv", "composed"}


def test_caches_are_searched_too(tiny: LoadedModel) -> None:
    looking = search(tiny, Judge())
    found = looking.at(0.4, "kv")
    assert found.kv <= 0.4 + 1e-6
    assert any(point.group == "plphp" for point in looking.points)


def test_an_allowed_drop_finds_the_cheapest(tiny: LoadedModel) -> None:
    plan, curve = find_plan(Ready(tiny), Judge(), WHOLE, Goal(0.05), None, lambda what: None)  # type: ignore[arg-type]
    assert curve.chosen is not None
    chosen = curve.points[curve.chosen]
    assert chosen.plan == plan and chosen.score >= 0.95
    cheaper = [point for point in curve.points if point.samples == 40 and point.flops < chosen.flops - 0.03]
    assert all(point.score < 0.95 for point in cheaper)


def test_too_much_is_refused_with_the_curve(tiny: LoadedModel) -> None:
    with pytest.raises(DropExceededError, match=r"loses .* more than 1.0%") as error:
        find_plan(Ready(tiny), Judge(), WHOLE, Goal(0.01, flops=0.1), None, lambda what: None)  # type: ignore[arg-type]
    assert error.value.curve.points


def test_an_unreachable_latency_is_told_at_once(tiny: LoadedModel) -> None:
    judge = Judge()
    with pytest.raises(EdgePruneError, match=r"pruning cannot pass 2.0x here, to 50.0 ms .*vision encoder is 40% of 100.0 ms"):
        find_plan(Ready(tiny), judge, WHOLE, Goal(0.01, ttft_ms=45.0), TIMES, lambda what: None)  # type: ignore[arg-type]
    assert not judge.asked


def test_a_latency_becomes_a_share() -> None:
    # 80 ms leave 40 for prefill: three quarters of the tokens.
    assert _target_share(Goal(0.01, ttft_ms=80.0), WHOLE, TIMES) == pytest.approx(0.75)
    with pytest.raises(UsageError, match="needs a device"):
        _target_share(Goal(0.01, ttft_ms=80.0), WHOLE, None)


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
        find_plan(Ready(tiny), Judge(5), WHOLE, Goal(0.01, flops=0.5), None, lambda what: None)  # type: ignore[arg-type]


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


def test_times_survive(tmp_path: Path) -> None:
    TIMES.save(tmp_path / "t.json")
    assert DeviceTimes.load(tmp_path / "t.json") == TIMES
    (tmp_path / "t.json").write_text('{"schema_version": 1}')
    with pytest.raises(UsageError, match="edgeprune profile"):
        DeviceTimes.load(tmp_path / "t.json")


def test_what_is_not_of_the_model_is_left_out_and_tiles_are_not_resized(tiny: LoadedModel) -> None:
    judge = Judge()
    judge.refused = ("visionzip", "fastv")
    found = search(tiny, judge)
    found.whole = replace(WHOLE, geometry=replace(GEOMETRY, views=GEOMETRY.layout))
    assert found.at(0.3, "flops").plan.cuts
    assert {point.plan.geometry for point in found.points} == {found.whole.geometry}
