"""A search's last stage: a rate for the decode steps behind the plan that was found, judged like it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_search import WHOLE, Judge, statistics

from edgeprune.calibration.allocate.dyrate import FORMS, DecodeRateOptions
from edgeprune.calibration.search.auto import DropExceededError, find_plan
from edgeprune.calibration.search.goal import Goal
from edgeprune.calibration.search.objectives import Agreed
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import UsageError
from edgeprune.io.progress import Count, Silent
from edgeprune.plan import Cut, KeepPlan

GOAL = Goal(0.05, flops=0.5, reads=0.4)


class Trained:
    """Knows rates without fitting them."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, str]] = []

    def fit_rate(self, base: KeepPlan, rate: DecodeRateOptions) -> KeepPlan:
        self.asked.append((rate.share, rate.form))
        ranked = base.with_cuts(*(Cut("cache", "plphp", base.tokens_at_layer(layer), layer) for layer in range(base.layers)))
        return ranked.with_cuts(Cut("decode", "dyrate", 0, 0, options={"form": rate.form, "schedule": [[0, rate.share]]}))


class Listener(Judge):
    """To whom every form costs something, and schedules the least."""

    def __init__(self, losses: dict[str, float]) -> None:
        super().__init__()
        self._losses = losses

    def score(self, plan: KeepPlan, count: int, progress: Count = lambda done: None, least: float = 0.0) -> Agreed:
        loss = self._losses[plan.decode.options["form"]] if plan.decode else 0.0
        agreed = super().score(replace(plan, cuts=tuple(cut for cut in plan.cuts if cut.site in ("input", "layer"))), count)
        return replace(agreed, mean=agreed.mean - loss)


def searched(tiny: LoadedModel, goal: Goal, losses: dict[str, float]) -> tuple[Trained, Any]:
    trained, judge = Trained(), Listener(losses)
    return trained, find_plan(tiny, statistics(), trained.fit_rate, judge, WHOLE, goal, None, Silent())  # type: ignore[arg-type]


def test_the_best_form_comes_behind_the_plan_that_was_found(tiny: LoadedModel) -> None:
    trained, (plan, curve) = searched(tiny, GOAL, {"predictor": 0.04, "schedule": 0.01, "map": 0.02})
    assert trained.asked == [(0.4, form) for form in FORMS]
    assert plan.decode is not None and plan.decode.options["form"] == "schedule"
    chosen = curve.points[curve.chosen]
    assert chosen.plan == plan and chosen.name.endswith("+ dyrate (schedule)") and chosen.flops <= 0.5
    _, (without, _) = searched(tiny, replace(GOAL, reads=None), {})
    assert without.decode is None and [cut for cut in plan.cuts if cut.site in ("input", "layer")] == list(without.cuts)


def test_a_rate_that_costs_too_much_is_refused_with_the_curve(tiny: LoadedModel) -> None:
    with pytest.raises(DropExceededError, match=r"40% of the reads loses .*dyrate \(map\)") as error:
        searched(tiny, GOAL, {"predictor": 0.4, "schedule": 0.3, "map": 0.2})
    assert {point.name.rpartition("+ ")[2] for point in error.value.curve.points[-3:]} == {f"dyrate ({form})" for form in FORMS}


@pytest.mark.parametrize("reads", [0.0, 1.5])
def test_reads_are_a_share(reads: float) -> None:
    with pytest.raises(UsageError, match="share"):
        Goal(0.05, reads=reads)
