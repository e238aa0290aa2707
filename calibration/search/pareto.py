"""Budgets of a search, and the Pareto curve of the measured plans."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import PlanError, UsageError
from edgeprune.io.files import write_text
from edgeprune.io.typed_json import fault
from edgeprune.plan import KeepPlan

SCHEMA_VERSION = 1
PlanFactory = Callable[[float], KeepPlan]  # maps a share of the unpruned cost, in (0, 1], to a plan
_BISECTIONS = 14  # resolves one token in ten thousand


@dataclass(frozen=True)
class Budget:
    """The maximum cost of a plan. `axis` "flops" or "kv": a share of the unpruned cost; "ttft_ms": milliseconds."""

    axis: str
    most: float

    def __str__(self) -> str:
        return f"{self.most:.1f} ms to the first token" if self.axis == "ttft_ms" else f"{self.most:.0%} of the {self.axis}"

    def plan(self, make: PlanFactory, ttft_ms: Callable[[KeepPlan], float]) -> KeepPlan:
        """Return the largest plan of the factory `make` within the budget; raise PlanError if all its plans cost more.

        On the axes "flops" and "kv" this is the plan at the budget's share. On "ttft_ms" the time saved depends on where tokens are
        dropped, so the share is found by bisection, with `ttft_ms` predicting the time of a plan.
        """
        if self.axis != "ttft_ms":
            return make(self.most)
        best: KeepPlan | None = None
        low, high, share = 0.0, 1.0, 1.0
        for _ in range(_BISECTIONS):
            try:
                plan = make(share)
                within = ttft_ms(plan) <= self.most
            except PlanError:  # the method cannot be that cheap
                within = True
            else:
                best = plan if within else best
            low, high = (share, high) if within else (low, share)
            share = (low + high) / 2
        if best is None:
            raise PlanError(f"No plan of this kind takes {self}.")
        return best


@dataclass(frozen=True)
class Point:
    """One measured plan.

    `group`: the method, or "composed". `flops`, `kv`: shares of the unpruned decoder's visual work in prefill and of its visual KV
    cache after it. `ttft_ms`: if times are known. `score`: agreement with the unpruned answers, 0 to 1, over `samples` samples.
    """

    name: str
    group: str
    flops: float
    kv: float
    score: float
    samples: int
    plan: KeepPlan
    ttft_ms: float | None = None

    def cost(self, axis: str) -> float:
        """Return the cost on the axis "flops", "kv" or "ttft_ms"."""
        value = {"flops": self.flops, "kv": self.kv, "ttft_ms": self.ttft_ms}[axis]
        assert value is not None
        return value


@dataclass(frozen=True)
class Curve:
    """All points of a search, its cost `axis`, and the index of the `chosen` point, if any."""

    axis: str
    points: tuple[Point, ...]
    chosen: int | None = None

    def front(self) -> list[Point]:
        """Return the Pareto-optimal points, cheapest first."""
        return pareto_front(self.points, self.axis)

    def save(self, path: Path) -> None:
        """Write the curve as JSON atomically."""
        points = [{**asdict(point), "plan": point.plan.to_dict()} for point in self.points]
        data = {"schema_version": SCHEMA_VERSION, "axis": self.axis, "chosen": self.chosen, "points": points}
        write_text(path, json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Curve:
        """Read a curve; raise UsageError if the file is unreadable, malformed or of another schema version."""
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
            if data["schema_version"] != SCHEMA_VERSION:
                raise UsageError(f"{path} has schema version {data['schema_version']}, this EdgePrune reads {SCHEMA_VERSION}.")
            points = tuple(Point(**{**point, "plan": KeepPlan.from_dict(point["plan"])}) for point in data["points"])
            return cls(str(data["axis"]), points, data["chosen"])
        except (OSError, ValueError, KeyError, TypeError, PlanError) as error:
            hint = "Write it with: edgeprune calibrate MODEL --data SAMPLES --method auto -o PLAN --curve FILE"
            raise UsageError(f"Cannot read the curve {path}: {fault(error)}.", hint=hint) from error


def pareto_front(points: Sequence[Point], axis: str) -> list[Point]:
    """Return the Pareto-optimal points by cost and score, cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost(axis), -point.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front
