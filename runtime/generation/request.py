"""Limits of a request, latency estimates, and the choice of a tier that meets the limits."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgeprune.errors import UsageError
from edgeprune.runtime.backends.interface import CancellationToken
from edgeprune.runtime.generation.sampling import Sampler, check_count, check_number
from edgeprune.runtime.telemetry.receipt import Receipt

DEFAULT, REQUESTED, DEADLINE, MEMORY = "default", "asked for", "deadline", "max_kv_bytes"
UNFINISHED = 2  # times as long as a prefill ran before its deadline, it is assumed to take
_WINDOW = 5  # measurements
_PATIENCE, _MAX_PATIENCE = 4, 16  # answers after which the measurements of a tier that is too slow are forgotten
_UNMEASURED = 50  # times as long as the encoding of the images, an answer before anything was measured


@dataclass(frozen=True)
class RequestLimits:
    """Limits of one request. Raises UsageError for limits out of range.

    * `tier`: the tier to use; None for the best that meets the other limits.
    * `deadline_ms`: milliseconds from the request to the end of the answer.
    * `max_kv_bytes`: limit of the conversation's KV cache, in bytes.
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
    """What prefill takes by tier (ms per image), and decode steps and answers (ms per token, tokens). Thread-safe.

    Each is the median of its newest 5 measurements, the lower of two middle ones: an outlier changes nothing, a change counts from
    the third answer on. What one tier takes bounds the others, since the cost grows with the work, and at most in proportion to it.
    """

    def __init__(self) -> None:
        self._prefill_ms: dict[int, deque[float]] = {}  # by tier, the one measured last at the end
        self._token_ms, self._tokens = deque[float](maxlen=_WINDOW), deque[float](maxlen=_WINDOW)
        self._skipped: dict[int, int] = {}
        self._patience: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def token_ms(self) -> float:
        """Milliseconds of a decode step, 0 if unknown."""
        return _median(self._token_ms)

    def update(self, tier: int, prefill_ms: float | None, token_ms: float, tokens: int) -> None:
        """Record one answer. `prefill_ms`: per image with selection, None without an image. `tokens`: 0 for a truncated answer."""
        with self._lock:
            if prefill_ms is not None:
                times = self._prefill_ms.pop(tier, None) or deque(maxlen=_WINDOW)
                self._prefill_ms[tier] = times
                times.append(prefill_ms)
                self._skipped[tier] = 0
                if len(times) > 1:
                    self._patience[tier] = _PATIENCE
            self._token_ms.extend([token_ms] if token_ms else [])
            self._tokens.extend([float(tokens)] if tokens else [])

    def skip(self, tier: int) -> None:
        """Note that a tier was passed over as too slow.

        It may have become faster, and only use measures it: after 4 answers its measurements are forgotten, so that the bound from
        other tiers decides. If it is then passed over again after one answer, that takes twice as many answers, up to 16.
        """
        with self._lock:
            self._skipped[tier] = self._skipped.get(tier, 0) + 1
            patience = self._patience.get(tier, _PATIENCE)
            if tier in self._prefill_ms and self._skipped[tier] >= patience:
                del self._prefill_ms[tier]
                self._patience[tier] = min(2 * patience, _MAX_PATIENCE)

    def expected_ms(self, work: Sequence[int], images: int, most: int, encoding_ms: float) -> list[float]:
        """Return for each tier the expected ms of an answer of at most `most` tokens, after image encoding.

        `work`: visual tokens of an image summed over the decoder's layers, by tier. A tier without measurements is assumed to take
        the bound that the tier measured last gives: no more than a higher tier, and than a lower one in proportion to its work. So
        it is used where there is time for it, and measured.

        Before any measurement an answer of the first tier is assumed to take 50 times `encoding_ms`, what preparing and encoding
        this turn's images took, and those of other tiers in proportion. That is more than most models take; so a long deadline gets
        the best tier at once, a short one begins with a tier that answers in time, and the next answers know better.
        """
        with self._lock:
            if not self._prefill_ms:
                return [_UNMEASURED * encoding_ms * own / work[0] for own in work]
            decode_ms = _median(self._token_ms) * min(_median(self._tokens) or most, most)
            return [images * self._expected_prefill(tier, work) + decode_ms for tier in range(len(work))]

    def _expected_prefill(self, tier: int, work: Sequence[int]) -> float:
        newest, times = next(reversed(self._prefill_ms.items()))
        measured, share = _median(times), work[tier] / work[newest]
        if tier in self._prefill_ms:  # if the machine has become slower since, the newest measurement shows it
            return max(_median(self._prefill_ms[tier]), measured * min(share, 1.0))
        return measured * max(share, 1.0)


def choose_tier(expected: Sequence[float], remaining_ms: float | None, sizes: Sequence[int], room: int | None) -> tuple[int, str]:
    """Return the first tier that is expected to meet the deadline and whose KV cache fits into `room`, with the reason.

    `expected`: time in ms by tier. `sizes`: KV cache bytes by tier. If no tier meets both, it is the last, fastest tier; the caller
    checks that it fits.
    """
    fits = [room is None or size <= room for size in sizes]
    in_time = [remaining_ms is None or ms <= remaining_ms for ms in expected]
    last = len(sizes) - 1
    chosen = next((tier for tier in range(last) if fits[tier] and in_time[tier]), last)
    if chosen == 0:
        return 0, DEFAULT
    return chosen, DEADLINE if fits[chosen - 1] else MEMORY


def _median(values: Sequence[float]) -> float:
    # The lower one of two middle values: of two measurements the shorter is no outlier. 0 without values.
    return sorted(values)[(len(values) - 1) // 2] if values else 0.0


@dataclass(frozen=True)
class Request:
    """One request: sampler, limits, receipt and cancellation.

    `started_s`: start time, in seconds of the monotonic clock. `rerank_by`: the question by which the visual tokens of all images
    are chosen anew, None to keep what was chosen.
    """

    sampler: Sampler
    limits: RequestLimits
    receipt: Receipt
    cancellation: CancellationToken = field(default_factory=CancellationToken)
    started_s: float = field(default_factory=time.monotonic)
    rerank_by: str | None = None

    @property
    def deadline_s(self) -> float | None:
        """The deadline in seconds of the monotonic clock, or None."""
        return None if self.limits.deadline_ms is None else self.started_s + self.limits.deadline_ms / 1e3

    @property
    def remaining(self) -> float | None:
        """Seconds until the deadline, or None without one."""
        return None if self.deadline_s is None else self.deadline_s - time.monotonic()
