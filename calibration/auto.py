"""`--method auto`: from a goal to a plan, with the Pareto curve of everything that was tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.calibration.agreement import Agreement
from edgeprune.calibration.calibrating import Calibration
from edgeprune.calibration.costs import predicted_ttft
from edgeprune.calibration.pareto import Curve, Point
from edgeprune.calibration.search import Search
from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.plan import KeepPlan
from edgeprune.runtime.profiling import DeviceTimes

SHARES = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1)  # tried in turn when the goal names no cost
LEAST = 20  # samples on which a plan can be judged at all


@dataclass(frozen=True)
class Goal:
    """What a plan must reach. `max_drop`: the share of agreement with the unpruned model that may be lost. At most one cost:
    `flops` or `kv` as a share of the unpruned, or `ttft_ms`.
    """

    max_drop: float
    flops: float | None = None
    kv: float | None = None
    ttft_ms: float | None = None

    def __post_init__(self) -> None:
        costs = [cost for cost in (self.flops, self.kv, self.ttft_ms) if cost is not None]
        if len(costs) > 1:
            raise UsageError("A search has one target.", hint="Give one of --target-flops, --target-kv and --target-ttft.")
        if not 0.0 <= self.max_drop <= 1.0 or any(cost <= 0 for cost in costs):
            raise UsageError("The allowed drop is a share from 0 to 1, and a target is above 0.")
        if any(share is not None and share > 1 for share in (self.flops, self.kv)):
            raise UsageError("A target is a share of the unpruned cost, at most 1.", hint="For example: --target-flops 0.25")

    @property
    def axis(self) -> str:
        """The cost that the goal is about."""
        return "kv" if self.kv is not None else "flops"


class DropExceededError(EdgePruneError):
    """No plan at the target's cost stays within the drop. `curve` is what was measured."""

    def __init__(self, message: str, curve: Curve, *, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.curve = curve


def find_plan(
    calibration: Calibration,
    held_out: Agreement,
    whole: KeepPlan,
    goal: Goal,
    times: DeviceTimes | None,
    progress: Callable[[str], None],
) -> tuple[KeepPlan, Curve]:
    """Return the cheapest plan found that meets the goal, and the curve of all that were measured on every held-out sample.

    Raises EdgePruneError at once when a latency cannot be reached by pruning at all, and DropExceededError when no plan at the
    target's cost agrees well enough.
    """
    if len(held_out) < LEAST:
        raise UsageError(
            f"A search needs {LEAST} samples to judge plans by, beside those for the statistics; there are {len(held_out)}."
        )
    shares = SHARES if (share := _target_share(goal, whole, times)) is None else (share,)
    parts = calibration.loaded.family.decoder()
    tower: Any = calibration.loaded.family.vision(whole.geometry)
    search = Search(parts, whole, calibration.statistics(), held_out, times, progress, tower.blocks)
    best: Point | None = None
    for share in shares:
        found = search.at(share, goal.axis)
        if found.score < 1.0 - goal.max_drop - 1e-9:
            if best is None:
                raise DropExceededError(
                    f"The best plan at {share:.0%} of the {goal.axis} loses {1 - found.score:.1%} of agreement ({found.name}), "
                    f"more than {goal.max_drop:.1%}.",
                    Curve(goal.axis, tuple(search.points)),
                    hint="Allow a larger --max-drop, or a higher cost.",
                )
            break
        best = found
    assert best is not None
    return best.plan, Curve(goal.axis, tuple(search.points), search.points.index(best))


def target_shares(goal: Goal, whole: KeepPlan, times: DeviceTimes | None, samples: int) -> tuple[float, ...]:
    """Return the costs to search at; raise EdgePruneError when `samples` are too few or a latency is out of reach."""
    share = _target_share(goal, whole, times)
    if samples < LEAST:
        raise UsageError(f"A search needs {LEAST} samples to judge plans by, beside those for the statistics; there are {samples}.")
    return SHARES if share is None else (share,)


def _target_share(goal: Goal, whole: KeepPlan, times: DeviceTimes | None) -> float | None:
    if goal.ttft_ms is None:
        return goal.kv if goal.kv is not None else goal.flops
    if times is None:
        raise UsageError(
            "A target in milliseconds needs a device.", hint="Give --device orin-nano, say, or --times FILE (edgeprune profile)."
        )
    whole_ms, least = predicted_ttft(times, whole), times.vision_ms + times.prefill_ms[0]
    if goal.ttft_ms <= least:
        raise EdgePruneError(
            f"{goal.ttft_ms:g} ms cannot be reached: pruning cannot pass {whole_ms / least:.1f}x here, to {least:.1f} ms "
            f"({times.how}, {times.device}); the vision encoder is {times.vision_ms / whole_ms:.0%} of {whole_ms:.1f} ms.",
            hint="Try a smaller --image-size.",
        )
    known = np.linspace(0.0, 1.0, len(times.prefill_ms))
    return float(min(1.0, np.interp(goal.ttft_ms - times.vision_ms, np.maximum.accumulate(times.prefill_ms), known)))
