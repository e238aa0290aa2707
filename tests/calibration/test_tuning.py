"""Options that calibration chooses: which are compared, in what order, and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from edgeprune.calibration.search.tuning import check_samples, to_try, tune
from edgeprune.errors import PlanError, UsageError
from edgeprune.plan import Cut, Geometry, KeepPlan, Option
from edgeprune.plan.presets import unpruned_plan

CORE = Option("core", 0.5, "share", least=0.0, most=1.0, tries=(0.1, 0.3))
RELEVANCE = Option("relevance", "pooled", "how", ("pooled", "max"), tries=("pooled", "max"))
BLOCK = Option("block", 1, "tokens", least=1)
BASE = unpruned_plan("qwen2_vl", 3, Geometry(84, 84, 14, 2))


class Judge:
    """Knows the divergence of a plan from the options of its cut."""

    def __init__(self) -> None:
        self.asked: list[Mapping[str, Any]] = []

    def __len__(self) -> int:
        return 7

    def divergences(self, plans: Sequence[KeepPlan], progress: Callable[[int], None]) -> list[float]:
        options = [plan.cuts[0].options for plan in plans]
        self.asked += options
        progress(7)
        return [abs(each["core"] - 0.25) + (0.0 if each["relevance"] == "max" else 0.2) for each in options]


def plan_of(options: Mapping[str, Any]) -> KeepPlan:
    return BASE.with_cuts(Cut("input", "zspaprune", 3, options=options))


def compared(plan: Callable[[Mapping[str, Any]], KeepPlan] = plan_of) -> tuple[Judge, list[tuple[Any, Any]], list[tuple[str, int]]]:
    judge, bars = Judge(), list[tuple[str, int]]()

    def bar(what: str, total: int) -> Callable[[int], None]:
        bars.append((what, total))
        return lambda done: None

    trials = tune([CORE, RELEVANCE], plan, judge, bar)  # type: ignore[arg-type]
    assert [trial.divergence for trial in trials] == sorted(trial.divergence for trial in trials)
    return judge, [(trial.options["core"], trial.options["relevance"]) for trial in trials], bars


def test_what_the_user_gives_is_not_compared() -> None:
    assert to_try([CORE, RELEVANCE, BLOCK], {}) == [CORE, RELEVANCE]
    assert to_try([CORE, RELEVANCE, BLOCK], {"core": 0.2}) == [RELEVANCE]


def test_one_option_after_the_other_takes_its_best_value() -> None:
    judge, ranked, bars = compared()
    assert ranked == [(0.3, "max"), (0.3, "pooled"), (0.1, "pooled"), (0.5, "pooled")]
    assert len(judge.asked) == 4  # none twice: the default of the second was measured with the first
    assert bars == [("comparing core", 7), ("comparing relevance", 7)]


def test_values_without_a_plan_are_left_out() -> None:
    def only_small(options: Mapping[str, Any]) -> KeepPlan:
        if options["core"] > 0.2:
            raise PlanError("too much")
        return plan_of(options)

    assert compared(only_small)[1] == [(0.1, "max"), (0.1, "pooled")]


def test_a_method_without_any_plan_says_why() -> None:
    def none(options: Mapping[str, Any]) -> KeepPlan:
        raise PlanError("never")

    with pytest.raises(PlanError, match="never"):
        compared(none)


def test_few_samples_cannot_choose() -> None:
    check_samples("zspaprune", [CORE], 20)
    check_samples("zspaprune", [], 1)
    with pytest.raises(UsageError, match=r"takes 20 samples; there are 19.*--option core=0.5 --option relevance=pooled"):
        check_samples("zspaprune", [CORE, RELEVANCE], 19)
