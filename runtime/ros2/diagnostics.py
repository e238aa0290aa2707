"""Statistics of the node, reported as a diagnostics message."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from edgeprune.errors import one_line
from edgeprune.runtime.telemetry.receipt import Receipt

OK, WARN, ERROR = 0, 1, 2  # levels of diagnostic_msgs/DiagnosticStatus


@dataclass(frozen=True)
class DiagnosticReport:
    """The content of one diagnostic_msgs/DiagnosticStatus: level, one line of text, and named values."""

    level: int
    message: str
    values: tuple[tuple[str, str], ...]


class NodeStatistics:
    """Counters, and the figures of the last answer. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(("frames received", "frames refused", "frames dropped"), 0)
        self._counts |= dict.fromkeys(("questions", "answers", "questions cancelled", "questions refused", "questions failed"), 0)
        self._counts["publishers unheard"] = 0
        self._last: dict[str, str] = {}  # figures of the last answer
        self._arrived: float | None = None
        self._current_errors = {"frame": "", "question": ""}  # "" when there is none
        self._last_error = ""

    def add(self, name: str) -> None:
        """Increment the counter `name`."""
        with self._lock:
            self._counts[name] += 1

    def frame(self, dropped: bool) -> None:
        """Count a decoded frame. `dropped`: it replaces a frame that arrived before the feed existed."""
        with self._lock:
            self._counts["frames received"] += 1
            self._counts["frames dropped"] += dropped
            self._arrived = time.monotonic()
            self._current_errors["frame"] = ""

    @property
    def frame_error(self) -> str:
        """Why the newest frame could not be used, or "" if it could."""
        with self._lock:
            return self._current_errors["frame"]

    def trouble(self, kind: str, count: str, error: str) -> None:
        """Record an error and increment the counter `count`. `kind`: "frame" or "question"; the next good one clears the error."""
        with self._lock:
            self._counts[count] += 1
            self._current_errors[kind] = self._last_error = one_line(error)

    def refuse(self) -> None:
        """Count a question that was refused because of older ones."""
        with self._lock:
            self._counts["questions refused"] += 1
            self._last_error = "A question was refused: another is waiting or being answered."

    def ended(self, receipt: Receipt) -> None:
        """Record the figures of a finished or cancelled answer."""
        with self._lock:
            self._current_errors["question"] = ""
            self._counts["questions cancelled" if receipt.finish_reason == "cancelled" else "answers"] += 1
            self._last = _figures(receipt)

    def report(self, phase: str, dropped: int) -> DiagnosticReport:
        """Return the current report. `phase`: what the node is doing. `dropped`: frames dropped by its feed."""
        with self._lock:
            level = ERROR if self._current_errors["question"] else WARN if self._current_errors["frame"] else OK
            counts = self._counts | {"frames dropped": self._counts["frames dropped"] + dropped}
            values = {"phase": phase} | {name: str(count) for name, count in counts.items()}
            values["newest frame came ms ago"] = "" if self._arrived is None else _ms(1e3 * (time.monotonic() - self._arrived))
            values |= self._last | {"last error": self._last_error}
            message = self._current_errors["question"] or self._current_errors["frame"] or phase
            return DiagnosticReport(level, message, tuple(values.items()))


def _figures(receipt: Receipt) -> dict[str, str]:
    kept = receipt.visual_stored / receipt.visual_whole * receipt.visual_tokens if receipt.visual_whole else 0.0
    return {
        "finish reason": receipt.finish_reason,
        "tier": receipt.tier or "",
        "frame age ms": "" if receipt.frame_age_ms is None else _ms(receipt.frame_age_ms),
        "ttft ms": _ms(receipt.times.ttft_ms),
        "ms per token": _ms(receipt.times.ms_per_token),
        "generated tokens": str(receipt.generated_tokens),
        "visual tokens": str(receipt.visual_tokens),
        "kept tokens": f"{kept:.1f}",  # mean over the decoder layers
    }


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.1f}"
