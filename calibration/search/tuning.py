"""Choose the options of one method: the declared values of each are compared by divergence from the unpruned model.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.calibration.search.goal import MIN_SAMPLES
from edgeprune.errors import PlanError, UsageError
from edgeprune.plan import KeepPlan, Option

if TYPE_CHECKING:
    from edgeprune.calibration.search.objectives import Agreement

PlanOf = Callable[[Mapping[str, Any]], KeepPlan]  # maps options to a plan


@dataclass(frozen=True)
class Trial:
    """One setting that was compared: its options, and the KL divergence from the unpruned answers in nats, mean over samples."""

    options: Mapping[str, Any]
    divergence: float


def to_try(declared: Sequence[Option], given: Mapping[str, Any]) -> list[Option]:
    """Return the options whose values are compared: those with `tries` that the user has not given."""
    return [option for option in declared if option.tries and option.name not in given]


def check_samples(method: str, options: Sequence[Option], samples: int) -> None:
    """Raise UsageError if there are too few samples to choose options by."""
    if options and samples < MIN_SAMPLES:
        names = ", ".join(option.name for option in options)
        settled = " ".join(f"--option {option.name}={option.default}" for option in options)
        raise UsageError(
            f"To choose {names} of {method} takes {MIN_SAMPLES} samples; there are {samples}.",
            hint=f"Give more, or say what is to be used: {settled}",
        )


def tune(
    options: Sequence[Option], plan_of: PlanOf, judge: Agreement, bar: Callable[[str, int], Callable[[int], None]]
) -> list[Trial]:
    """Return all settings that were compared, best first.

    One option after the other takes the value of the least divergence, while the earlier ones keep theirs and the later ones
    their defaults. Values with which the method makes no plan are left out. `bar` begins a progress bar by name and total. Raises
    PlanError if the method makes no plan at all.
    """
    best = {option.name: option.default for option in options}
    trials: dict[str, Trial] = {}
    for option in options:
        settings = [{**best, option.name: value} for value in dict.fromkeys((option.default, *option.tries))]
        fresh = _plans([setting for setting in settings if str(setting) not in trials], plan_of)
        divergences = judge.divergences(list(fresh.values()), bar(f"comparing {option.name}", len(judge)))
        for name, divergence in zip(fresh, divergences, strict=True):
            trials[name] = Trial(next(setting for setting in settings if str(setting) == name), divergence)
        best = dict(min(trials.values(), key=lambda trial: trial.divergence).options)
    return sorted(trials.values(), key=lambda trial: trial.divergence)


def _plans(settings: Sequence[Mapping[str, Any]], plan_of: PlanOf) -> dict[str, KeepPlan]:
    plans: dict[str, KeepPlan] = {}
    refused: PlanError | None = None
    for setting in settings:
        try:
            plans[str(setting)] = plan_of(setting)
        except PlanError as error:
            refused = error
    if refused is not None and not plans:
        raise refused
    return plans
