"""`--method auto`: from a goal to a plan, with the Pareto curve of everything that was tried.

The last stage fits a keep ratio for the decode steps behind the plan that was found.
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

SHARES = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1)  # tried in turn when the goal names no cost
LEAST = 20  # samples on which a plan can be judged at all
FitRate = Callable[[KeepPlan, DecodeRateOptions], KeepPlan]  # fits a rate for the decode steps of a plan


def decode_rate_points(
    found: Point, reads: float, fit_rate: FitRate, held_out: Agreement, progress: Callable[[str], None]
) -> list[Point]:
    """Return the plan found with DyRate behind it in each of its forms, the best first.

    Steps read `reads` of the visual tokens that the plan leaves in the caches, on the average of the answers that `fit_rate` learns
    from. Prefill and what is held stay as they are, so that the other costs are those of `found`. Raises what `fit_rate` raises.
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
    """What a plan must reach. `max_drop`: the share of agreement with the unpruned model that may be lost. At most one cost:
    `flops` or `kv` as a share of the unpruned, or `ttft_ms`. And `reads`: the share of what the caches hold of the image that
    decode steps read.
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
        """Return whether a plan agrees well enough."""
        return point.score >= 1.0 - self.max_drop - 1e-9

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """What to search at: the target, or where there is none shares of the decoder's work, one after another."""
        for axis, most in (("flops", self.flops), ("kv", self.kv), ("ttft_ms", self.ttft_ms)):
            if most is not None:
                return (Budget(axis, most),)
        return tuple(Budget("flops", share) for share in SHARES)


class DropExceededError(EdgePruneError):
    """No plan at the target's cost stays within the drop. `curve` is what was measured."""

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
    """Return the cheapest plan found that meets the goal, and the curve of all that were measured on every held-out sample.

    Raises EdgePruneError at once when a latency cannot be reached by pruning at all, and DropExceededError when no plan at the
    target's cost agrees well enough.
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
                raise _exceeded(goal, found, str(budget), Curve(axis, tuple(search.points)))
            break
        best = found
    assert best is not None
    curve = Curve(axis, tuple(search.points), search.points.index(best))
    if goal.reads is None:
        return best.plan, curve
    decoded = decode_rate_points(best, goal.reads, fit_rate, held_out, progress)
    curve = replace(curve, points=(*curve.points, *decoded), chosen=len(curve.points))
    if not goal.allows(decoded[0]):
        raise _exceeded(goal, decoded[0], f"{goal.reads:.0%} of the reads", replace(curve, chosen=None))
    return decoded[0].plan, curve


def _exceeded(goal: Goal, best: Point, cost: str, curve: Curve) -> DropExceededError:
    return DropExceededError(
        f"The best plan at {cost} loses {1 - best.score:.1%} of agreement ({best.name}), more than {goal.max_drop:.1%}.",
        curve,
        hint="Allow a larger --max-drop, or a higher cost.",
    )


def check_goal(goal: Goal, loaded: LoadedModel, unpruned: KeepPlan, times: DeviceProfile | None, samples: int) -> None:
    """Raise EdgePruneError when a latency is out of reach for pruning, UsageError when `samples` are too few to judge plans by."""
    if goal.ttft_ms is not None:
        if times is None:
            raise UsageError(
                "A target in milliseconds needs a device.",
                hint="Give --device orin-nano, say, or --times FILE (edgeprune profile).",
            )
        _check_reachable(goal.ttft_ms, times, unpruned, prunable_encoder_blocks(loaded, unpruned))
    if samples < LEAST:
        raise UsageError(f"A search needs {LEAST} samples to judge plans by, beside those for the statistics; there are {samples}.")


def prunable_encoder_blocks(loaded: LoadedModel, unpruned: KeepPlan) -> int:
    """Return how many blocks a vision encoder has inside which tokens can leave, 0 for one that all must pass."""
    if loaded.family.no_encoder_cuts_reason:
        return 0
    tower: Any = loaded.family.vision(unpruned.geometry)
    return int(tower.blocks)


def _check_reachable(target: float, times: DeviceProfile, unpruned: KeepPlan, blocks: int) -> None:
    # At best all tokens but one of each view leave at the first block where the search lets them, and the last one at the decoder.
    first = encoder_blocks(blocks)[:1]
    thinned = unpruned.with_cuts(*(Cut("vision", ENCODER, len(unpruned.geometry.layout), block) for block in first))
    whole_ms, least = predicted_ttft(times, unpruned), encoder_ms(times, thinned, max(blocks, 1)) + times.prefill_ms[0]
    if target <= least:
        raise EdgePruneError(
            f"{target:g} ms cannot be reached: pruning cannot pass {whole_ms / least:.1f}x here, to {least:.1f} ms "
            f"({times.how}, {times.device}); the vision encoder is {times.vision_ms / whole_ms:.0%} of {whole_ms:.1f} ms.",
            hint="Try a smaller --image-size.",
        )
