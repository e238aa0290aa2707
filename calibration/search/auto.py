"""`--method auto`: find a plan that meets a goal, with the Pareto curve of all measured plans.

An optional last stage fits a DyRate cut for the decode steps to the plan that was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from edgeprune.calibration.allocate.dyrate import FORMS, DecodeRateOptions
from edgeprune.calibration.data.statistics import Statistics
from edgeprune.calibration.search.candidates import ENCODER, encoder_blocks
from edgeprune.calibration.search.goal import Goal
from edgeprune.calibration.search.objectives import Agreement, encoder_ms, predicted_ttft
from edgeprune.calibration.search.pareto import Curve, Point, facts_of
from edgeprune.calibration.search.search import Search
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.device.profile import DeviceProfile
from edgeprune.errors import EdgePruneError
from edgeprune.io.progress import Progress
from edgeprune.plan import Cut, KeepPlan

FitRate = Callable[[KeepPlan, DecodeRateOptions], KeepPlan]  # adds a fitted DyRate cut to a plan


def decode_rate_points(found: Point, reads: float, fit_rate: FitRate, held_out: Agreement, progress: Progress) -> list[Point]:
    """Return the plan found plus a DyRate cut in each of its forms, best score first.

    `reads`: the mean share of cached visual tokens that decode steps read, over the answers that `fit_rate` learns from. Prefill
    and cache size do not change, so the other costs are those of `found`. Raises the errors of `fit_rate`.
    """
    points = []
    for form in FORMS:
        plan = fit_rate(found.plan, DecodeRateOptions(reads, form))
        counted = progress.count(f"dyrate ({form}), samples", len(held_out))
        agreed = held_out.score(plan, len(held_out), counted)
        precision, recall = facts_of(agreed.facts)
        named = replace(found, name=f"{found.name} + dyrate ({form})", group="composed")
        points.append(replace(named, plan=plan, score=agreed.mean, precision=precision, recall=recall))
    return sorted(points, key=lambda point: -point.score)


class DropExceededError(EdgePruneError):
    """No plan at the target's cost stays within the allowed drop. `curve`: the measured plans."""

    def __init__(self, message: str, curve: Curve, *, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.curve = curve


def find_plan(
    loaded: LoadedModel,
    statistics: Statistics | None,
    fit_rate: FitRate,
    held_out: Agreement,
    unpruned: KeepPlan,
    goal: Goal,
    times: DeviceProfile | None,
    progress: Progress,
    learned: Sequence[Cut] = (),
) -> tuple[KeepPlan, Curve]:
    """Return the cheapest plan found that meets the goal, and the curve of all plans measured on every held-out sample.

    `statistics`: for a budget of caches, with the parts attention and caches; with FitPrune's part that method is a candidate.
    `learned`: cuts of the method of that name that are candidates, of any number of tokens.
    Raises EdgePruneError before the search if pruning cannot reach the target latency, and DropExceededError if no plan at the
    target's cost stays within the allowed drop.
    """
    check_goal(goal, loaded, unpruned, times, len(held_out))
    blocks = prunable_encoder_blocks(loaded, unpruned)
    search = Search(loaded.family.decoder(), unpruned, statistics, held_out, times, progress, blocks, learned)
    budgets = goal.budgets
    axis = budgets[0].axis
    best: Point | None = None
    for budget in budgets:
        found = search.at(budget)
        if not goal.allows(found):
            if best is None:
                raise _drop_exceeded(goal, found, str(budget), Curve(axis, tuple(search.points)))
            break
        best = found
    assert best is not None
    curve = Curve(axis, tuple(search.points), search.points.index(best))
    if goal.reads is None:
        return best.plan, curve
    decoded = decode_rate_points(best, goal.reads, fit_rate, held_out, progress)
    curve = replace(curve, points=(*curve.points, *decoded), chosen=len(curve.points))
    if not goal.allows(decoded[0]):
        raise _drop_exceeded(goal, decoded[0], f"{goal.reads:.0%} of the reads", replace(curve, chosen=None))
    return decoded[0].plan, curve


def _drop_exceeded(goal: Goal, best: Point, cost: str, curve: Curve) -> DropExceededError:
    return DropExceededError(
        f"The best plan at {cost} loses {1 - best.score:.1%} of agreement ({best.name}), more than {goal.max_drop:.1%}.",
        curve,
        hint="Allow a larger --max-drop, or a higher cost. What was measured is kept for that.",
    )


def check_goal(goal: Goal, loaded: LoadedModel, unpruned: KeepPlan, times: DeviceProfile | None, samples: int) -> None:
    """Raise EdgePruneError if pruning cannot reach the target latency, UsageError if there are too few `samples`."""
    goal.check_inputs(has_times=times is not None, samples=samples)
    if goal.ttft_ms is not None and times is not None:
        _check_reachable(goal.ttft_ms, times, unpruned, prunable_encoder_blocks(loaded, unpruned))


def prunable_encoder_blocks(loaded: LoadedModel, unpruned: KeepPlan) -> int:
    """Return the number of blocks of the vision encoder, 0 if the encoder does not support cuts."""
    if loaded.family.no_encoder_cuts_reason:
        return 0
    tower: Any = loaded.family.vision(unpruned.geometry)
    return int(tower.blocks)


def _check_reachable(target: float, times: DeviceProfile, unpruned: KeepPlan, blocks: int) -> None:
    # Lower bound: one token per view remains after the first block where the search cuts, and none enters the decoder.
    first = encoder_blocks(blocks)[:1]
    smallest = unpruned.with_cuts(*(Cut("vision", ENCODER, len(unpruned.geometry.layout), block) for block in first))
    unpruned_ms, least_ms = predicted_ttft(times, unpruned), encoder_ms(times, smallest, max(blocks, 1)) + times.prefill_ms[0]
    if target <= least_ms:
        raise EdgePruneError(
            f"{target:g} ms cannot be reached: pruning cannot pass {unpruned_ms / least_ms:.1f}x here, to {least_ms:.1f} ms "
            f"({times.how}, {times.device}); the vision encoder is {times.vision_ms / unpruned_ms:.0%} of {unpruned_ms:.1f} ms.",
            hint="Try a smaller --image-size.",
        )
