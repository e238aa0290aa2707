"""Limits of a request, latency estimates, and the choice of a tier that meets the limits."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgeprune.errors import UsageError
from edgeprune.runtime.backends.interface import CancellationToken
from edgeprune.runtime.generation.sampling import Sampler, check_count, check_number
from edgeprune.runtime.telemetry.receipt import Receipt

DEFAULT, REQUESTED, DEADLINE, MEMORY = "default", "asked for", "deadline", "max_kv_bytes"
_EMA_WEIGHT = 0.3  # weight of the newest answer in the moving averages
_DECAY = 0.98  # factor on a tier's estimate each time the tier is skipped as too slow


@dataclass(frozen=True)
class RequestLimits:
    """Limits of one request.

    `tier`: the tier to use, None for the best that meets the other limits. `deadline_ms`: from the request to the end of the
    answer. `max_kv_bytes`: limit of the conversation's KV cache. Raises UsageError for limits out of range.
    """

    tier: str | None = None
    deadline_ms: float | None = None
    max_kv_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.tier is not None and not isinstance(self.tier, str):
            raise UsageError(f"tier must be the name of a tier, not {self.tier!r}.")
        if self.deadline_ms is not None and check_number("deadline_ms", self.deadline_ms) <= 0:
            raise UsageError(f"deadline_ms must be above 0, not {self.deadline_ms}.")
        if self.max_kv_bytes is not None:
            check_count("max_kv_bytes", self.max_kv_bytes, 1)


class LatencyEstimate:
    """Moving averages of prefill time by tier (ms per image), decode time (ms per token) and tokens per answer. Thread-safe.

    Exponential: the newest answer has weight 0.3.
    """

    def __init__(self) -> None:
        self.token_ms = self.tokens = 0.0
        self._prefill_ms: dict[int, float] = {}
        self._lock = threading.Lock()

    def update(self, tier: int, prefill_ms: float | None, token_ms: float, tokens: int) -> None:
        """Record one answer. `prefill_ms`: per image with selection, None without an image. `tokens`: 0 for a truncated answer."""
        with self._lock:
            if prefill_ms is not None:
                self._prefill_ms[tier] = _moving_average(self._prefill_ms.get(tier, 0.0), prefill_ms)
            self.token_ms = _moving_average(self.token_ms, token_ms) if token_ms else self.token_ms
            self.tokens = _moving_average(self.tokens, float(tokens)) if tokens else self.tokens

    def decay(self, tier: int) -> None:
        """Lower the estimate of a tier that was skipped as too slow: it may have become faster, and only use measures it."""
        with self._lock:
            if tier in self._prefill_ms:
                self._prefill_ms[tier] *= _DECAY

    def expected_ms(self, tier: int, images: int, most: int) -> float | None:
        """Return the expected ms of an answer of at most `most` tokens after image encoding; None for an unmeasured tier."""
        prefill = self._prefill_ms.get(tier)
        if prefill is None:
            return None
        return images * prefill + self.token_ms * min(self.tokens or most, most)


def choose_tier(
    expected: Sequence[float | None], remaining_ms: float | None, sizes: Sequence[int], room: int | None
) -> tuple[int, str]:
    """Return the first tier that is expected to meet the deadline and whose KV cache fits into `room`, with the reason.

    `expected`: time in ms by tier, None (unknown) counts as too slow. `sizes`: KV cache bytes by tier. If no tier meets both, the
    result is the last, fastest tier; the caller checks that it fits.
    """
    fits = [room is None or size <= room for size in sizes]
    in_time = [remaining_ms is None or (ms is not None and ms <= remaining_ms) for ms in expected]
    last = len(sizes) - 1
    chosen = next((tier for tier in range(last) if fits[tier] and in_time[tier]), last)
    if chosen == 0:
        return 0, DEFAULT
    return chosen, DEADLINE if fits[chosen - 1] else MEMORY


def _moving_average(average: float, newest: float) -> float:
    return (1 - _EMA_WEIGHT) * average + _EMA_WEIGHT * newest if average else newest


@dataclass(frozen=True)
class Request:
    """One request: sampler, limits, receipt and cancellation. `started_s`: start time, in seconds of the monotonic clock."""

    sampler: Sampler
    limits: RequestLimits
    receipt: Receipt
    cancellation: CancellationToken = field(default_factory=CancellationToken)
    started_s: float = field(default_factory=time.monotonic)

    @property
    def deadline_s(self) -> float | None:
        """The deadline in seconds of the monotonic clock, or None."""
        return None if self.limits.deadline_ms is None else self.started_s + self.limits.deadline_ms / 1e3

    @property
    def remaining(self) -> float | None:
        """Seconds until the deadline, or None without one."""
        return None if self.deadline_s is None else self.deadline_s - time.monotonic()
