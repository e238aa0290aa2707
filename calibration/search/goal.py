"""The goal of `--method auto`: the allowed loss of agreement, and at most one cost target. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune.calibration.search.pareto import Budget, Point
from edgeprune.errors import UsageError

SHARES = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1)  # cost shares that are searched in turn if the goal has no target
MIN_SAMPLES = 20  # held-out samples that a search needs


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

    def check_inputs(self, *, has_times: bool, samples: int) -> None:
        """Raise UsageError for a target latency without a device's times, or too few held-out `samples`."""
        if self.ttft_ms is not None and not has_times:
            raise UsageError(
                "A target in milliseconds needs a device.",
                hint="Give --device orin-nano, say, or --times FILE (edgeprune profile).",
            )
        if samples < MIN_SAMPLES:
            raise UsageError(
                f"A search needs {MIN_SAMPLES} samples to judge plans by, beside those for the statistics; there are {samples}."
            )
