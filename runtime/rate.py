"""The decode cut at work: how much of the visual cache each step of an answer reads (DyRate, arXiv 2501.14204).

A share never grows within an answer: what was dropped is not missed twice. By a schedule it depends on the step alone; a live
predictor looks at where the newest token's attention went.
"""

from __future__ import annotations

from bisect import bisect_right

from edgeprune.plan import Cut
from edgeprune.runtime.backends.interface import Engine, Step
from edgeprune.runtime.backends.kv_cache import KvCache
from edgeprune.runtime.telemetry.receipt import Receipt


class Rate:
    """The rate of one answer, asked before each of its decode steps."""

    def __init__(self, engine: Engine, cut: Cut | None) -> None:
        self._engine, self._cut = engine, cut
        self._step, self.share = 0, 1.0

    def shorten(self, cache: KvCache, before: Step, receipt: Receipt) -> KvCache:
        """Return the cache for the next decode step. `before`: the step whose token it takes in."""
        if self._cut is None:
            return cache
        share = self._scheduled() if before.split is None else self._engine.rate(before.split, self._step)
        self._step += 1
        if self._cut.options.get("monotone", True):
            share = min(share, self.share)
        receipt.decode_shares.append(share)
        if share == self.share:
            return cache
        self.share = share
        return cache.shortened(share, self._cut.layer)

    def _scheduled(self) -> float:
        assert self._cut is not None
        steps, shares = self._cut.options["steps"], self._cut.options["shares"]
        entry = bisect_right(steps, self._step) - 1
        return float(shares[entry]) if entry >= 0 else 1.0
