"""What a search may spend, and the largest plan of a kind within it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgeprune.errors import PlanError
from edgeprune.plan import KeepPlan

Make = Callable[[float], KeepPlan]  # from the share of the unpruned cost, in (0, 1], to a plan of a kind
_HALVINGS = 14  # of the shares between nothing and everything: finer than one token of ten thousand


@dataclass(frozen=True)
class Budget:
    """The most that a plan may cost: along "flops" or "kv" a share of the unpruned, along "ttft_ms" milliseconds."""

    axis: str
    most: float

    def __str__(self) -> str:
        return f"{self.most:.1f} ms to the first token" if self.axis == "ttft_ms" else f"{self.most:.0%} of the {self.axis}"

    def plan(self, make: Make, ttft_ms: Callable[[KeepPlan], float]) -> KeepPlan:
        """Return the largest plan of a kind within the budget; raise PlanError when every plan of it costs more.

        Along "flops" and "kv" it is the one at the budget's share. Milliseconds are no share: what a plan gains depends on where
        its tokens leave, so the share is searched for, and `ttft_ms` says what a plan takes.
        """
        if self.axis != "ttft_ms":
            return make(self.most)
        best: KeepPlan | None = None
        low, high, share = 0.0, 1.0, 1.0
        for _ in range(_HALVINGS):
            try:
                plan = make(share)
                within = ttft_ms(plan) <= self.most
            except PlanError:  # methods refuse what is too cheap for them
                within = True
            else:
                best = plan if within else best
            low, high = (share, high) if within else (low, share)
            share = (low + high) / 2
        if best is None:
            raise PlanError(f"No plan of this kind takes {self}.")
        return best
