"""What an answer may take, and which of a bundle's prepared budgets that leaves."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgeprune.errors import UsageError
from edgeprune.runtime.backends.interface import CancellationToken
from edgeprune.runtime.generation.sampling import Sampler
from edgeprune.runtime.telemetry.receipt import Receipt

DEFAULT, REQUESTED, DEADLINE, MEMORY = "default", "asked for", "deadline", "max_kv_bytes"
_EMA_WEIGHT = 0.3  # of the newest answer in what is expected of the next
_DECAY = 0.98  # what is left of an expectation each time a tier is passed over for it


@dataclass(frozen=True)
class RequestLimits:
    """`tier`: the budget to use, None for the best one that the other terms allow. `deadline_ms`: from the question to the end of
    the answer. `max_kv_bytes`: of the conversation's KV caches.
    """

    tier: str | None = None
    deadline_ms: float | None = None
    max_kv_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.deadline_ms is not None and not (math.isfinite(self.deadline_ms) and self.deadline_ms > 0):
            raise UsageError(f"deadline_ms must be above 0, not {self.deadline_ms}.")
        if self.max_kv_bytes is not None and self.max_kv_bytes < 1:
            raise UsageError(f"max_kv_bytes must be 1 or more, not {self.max_kv_bytes}.")


class LatencyEstimate:
    """How long answers have taken lately: prefill by tier, a token, and how many tokens an answer had. Thread-safe.

    Averages in which every answer counts 0.3 and what was known before it the rest.
    """

    def __init__(self) -> None:
        self.token_ms = self.tokens = 0.0
        self._prefill_ms: dict[int, float] = {}
        self._lock = threading.Lock()

    def update(self, tier: int, prefill_ms: float | None, token_ms: float, tokens: int) -> None:
        """Take in one answer; `prefill_ms` of one image with its selection, None without an image."""
        with self._lock:
            if prefill_ms is not None:
                self._prefill_ms[tier] = _blended(self._prefill_ms.get(tier, 0.0), prefill_ms)
            self.token_ms = _blended(self.token_ms, token_ms) if token_ms else self.token_ms
            self.tokens = _blended(self.tokens, float(tokens)) if tokens else self.tokens

    def decay(self, tier: int) -> None:
        """Expect a little less of a tier that was too slow: it is not measured while nobody takes it, and may have got faster."""
        with self._lock:
            if tier in self._prefill_ms:
                self._prefill_ms[tier] *= _DECAY

    def expected_ms(self, tier: int, images: int, most: int) -> float | None:
        """Return how long an answer of at most `most` tokens will take after its images were encoded; None if nobody knows."""
        prefill = self._prefill_ms.get(tier)
        if prefill is None:
            return None
        return images * prefill + self.token_ms * min(self.tokens or most, most)


def choose_tier(
    expected: Sequence[float | None], remaining_ms: float | None, sizes: Sequence[int], room: int | None
) -> tuple[int, str]:
    """Return the first tier that is expected to be done in time and whose caches have room, and why it is not the first of all.

    `sizes`: bytes of the caches under each tier. What is not known counts as too slow. Where nothing is in time it is the last, the
    fastest; tiers without room are never taken: the caller sees to it that the last has.
    """
    fits = [room is None or size <= room for size in sizes]
    timely = [remaining_ms is None or (ms is not None and ms <= remaining_ms) for ms in expected]
    last = len(sizes) - 1
    chosen = next((tier for tier in range(last) if fits[tier] and timely[tier]), last)
    if chosen == 0:
        return 0, DEFAULT
    return chosen, DEADLINE if fits[chosen - 1] else MEMORY


def _blended(before: float, newest: float) -> float:
    return (1 - _EMA_WEIGHT) * before + _EMA_WEIGHT * newest if before else newest


@dataclass(frozen=True)
class Request:
    """How one question is to be answered. `deadline_s`: the end of its deadline, in seconds of the monotonic clock."""

    sampler: Sampler
    limits: RequestLimits
    receipt: Receipt
    cancellation: CancellationToken = field(default_factory=CancellationToken)
    started_s: float = field(default_factory=time.monotonic)

    @property
    def deadline_s(self) -> float | None:
        """When the answer has to be complete, in seconds of the monotonic clock."""
        return None if self.limits.deadline_ms is None else self.started_s + self.limits.deadline_ms / 1e3

    @property
    def remaining(self) -> float | None:
        """Seconds until then, None without a deadline."""
        return None if self.deadline_s is None else self.deadline_s - time.monotonic()
