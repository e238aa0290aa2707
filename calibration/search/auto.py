"""`--method auto`: find a plan that meets a goal, with the Pareto curve of all measured plans.

An optional last stage fits a DyRate cut for the decode steps to the plan that was found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from edgeprune.calibration.allocate.dyrate import FORMS, DecodeRateOptions
from edgeprune.calibration.data.statistics import Statistics
from edgeprune.calibration.search.candidates import ENCODER, encoder_blocks
from edgeprune.calibration.search.objectives import Agreement, encoder_ms, predicted_ttft
from edgeprune.calibration.search.pareto import Budget, Curve, Point
from edgeprune.calibration.search.search import Search
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.device.profile import DeviceProfile
from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.plan import Cut, KeepPlan

SHARES = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1)  # cost shares that are searched in turn if the goal has no target
MIN_SAMPLES = 20  # held-out samples that a search needs
FitRate = Callable[[KeepPlan, DecodeRateOptions], KeepPlan]  # adds a fitted DyRate cut to a plan


def decode_rate_points(
    found: Point, reads: float, fit_rate: FitRate, held_out: Agreement, progress: Callable[[str], None]
) -> list[Point]:
    """Return the plan found plus a DyRate cut in each of its forms, best score first.

    `reads`: the mean share of cached visual tokens that decode steps read, over the answers that `fit_rate` learns from. Prefill
    and cache size do not change, so the other costs are those of `found`. Raises the errors of `fit_rate`.
    """
    points = []
    for form in FORMS:
        plan = fit_rate(found.plan, DecodeRateOptions(reads, form))
        progress(f"dyrate ({form}), {len(held_out)} samples")
        score = held_out.score(plan, len(held_out))
        points.append(replace(found, name=f"{found.name} + dyrate ({form})", group="composed", plan=plan, score=score))
    return sorted(points, key=lambda point: -point.score)


@dataclass(frozen=True)
class Goal:
    """The goal of a search: the allowed loss of agreement and at most one cost target.

    `max_drop`: the loss of agreement with the unpruned model that is allowed, 0 to 1. Target: `flops` or `kv` as a share of the
    unpruned cost, or `ttft_ms`. `reads`: the share of cached visual tokens that decode steps read. Raises UsageError for
    contradictory or invalid values.
    """

    max_drop: float
    flops: float | None = None
    kv: float | None = None
    ttft_ms: float | None = None
    reads: float | None = None

    def __post_init__(self) -> None:
        costs = [cost for cost in (self.flops, self.kv, self.ttft_ms) if cost is not None]
        if len(costs) > 1:
            raise UsageError("A search has one target.", hint="Give one of --target-flops, --target-kv and --target-ttft.")
        if not 0.0 <= self.max_drop <= 1.0 or any(cost <= 0 for cost in costs):
            raise UsageError("The allowed drop is a share from 0 to 1, and a target is above 0.")
        shares = [share for share in (self.flops, self.kv, self.reads) if share is not None]
        if not all(0.0 < share <= 1.0 for share in shares):
            raise UsageError("A target is a share of the unpruned cost, at most 1.", hint="For example: --target-flops 0.25")

    def allows(self, point: Point) -> bool:
        """Return whether a plan's loss of agreement is within `max_drop`."""
        return point.score >= 1.0 - self.max_drop - 1e-9

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets to search in turn: the target, or without a target SHARES of the decoder's visual work."""
        for axis, most in (("flops", self.flops), ("kv", self.kv), ("ttft_ms", self.ttft_ms)):
            if most is not None:
                return (Budget(axis, most),)
        return tuple(Budget("flops", share) for share in SHARES)


class DropExceededError(EdgePruneError):
    """No plan at the target's cost stays within the allowed drop. `curve`: the measured plans."""

    def __init__(self, message: str, curve: Curve, *, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.curve = curve


def find_plan(
    loaded: LoadedModel,
    statistics: Statistics,
    fit_rate: FitRate,
    held_out: Agreement,
    unpruned: KeepPlan,
    goal: Goal,
    times: DeviceProfile | None,
    progress: Callable[[str], None],
) -> tuple[KeepPlan, Curve]:
    """Return the cheapest plan found that meets the goal, and the curve of all plans measured on every held-out sample.

    Raises EdgePruneError before the search if pruning cannot reach the target latency, and DropExceededError if no plan at the
    target's cost stays within the allowed drop.
    """
    check_goal(goal, loaded, unpruned, times, len(held_out))
    blocks = prunable_encoder_blocks(loaded, unpruned)
    search = Search(loaded.family.decoder(), unpruned, statistics, held_out, times, progress, blocks)
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
        hint="Allow a larger --max-drop, or a higher cost.",
    )


def check_goal(goal: Goal, loaded: LoadedModel, unpruned: KeepPlan, times: DeviceProfile | None, samples: int) -> None:
    """Raise EdgePruneError if pruning cannot reach the target latency, UsageError if there are too few `samples`."""
    if goal.ttft_ms is not None:
        if times is None:
            raise UsageError(
                "A target in milliseconds needs a device.",
                hint="Give --device orin-nano, say, or --times FILE (edgeprune profile).",
            )
        _check_reachable(goal.ttft_ms, times, unpruned, prunable_encoder_blocks(loaded, unpruned))
    if samples < MIN_SAMPLES:
        raise UsageError(
            f"A search needs {MIN_SAMPLES} samples to judge plans by, beside those for the statistics; there are {samples}."
        )


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
