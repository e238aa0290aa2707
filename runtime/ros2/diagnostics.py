"""What the node has seen and done, as the values of a diagnostics message."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from edgeprune.runtime.telemetry.receipt import Receipt

OK, WARN, ERROR = 0, 1, 2  # of diagnostic_msgs/DiagnosticStatus


@dataclass(frozen=True)
class DiagnosticReport:
    """One diagnostic_msgs/DiagnosticStatus: its level, one line, and values by name."""

    level: int
    message: str
    values: tuple[tuple[str, str], ...]


class NodeStatistics:
    """Counts and the figures of the last answer. Any thread may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(("frames received", "frames refused", "frames dropped"), 0)
        self._counts |= dict.fromkeys(("questions", "answers", "questions cancelled", "questions refused", "questions failed"), 0)
        self._last: dict[str, str] = {}  # figures of the last answer
        self._arrived: float | None = None
        self._trouble = {"frame": "", "question": ""}  # what is wrong now
        self._error = ""

    def add(self, name: str) -> None:
        """Count one more of what `name` says."""
        with self._lock:
            self._counts[name] += 1

    def frame(self, dropped: bool) -> None:
        """Count a frame that can be read; `dropped`: it replaces one before there is a feed to count that."""
        with self._lock:
            self._counts["frames received"] += 1
            self._counts["frames dropped"] += dropped
            self._arrived = time.monotonic()
            self._trouble["frame"] = ""

    def trouble(self, kind: str, count: str, error: str) -> None:
        """Note what went wrong with a "frame" or a "question". It is the state of things until the next good one."""
        with self._lock:
            self._counts[count] += 1
            self._trouble[kind] = self._error = error

    def refuse(self) -> None:
        """Count a question that is not answered because others are."""
        with self._lock:
            self._counts["questions refused"] += 1
            self._error = "A question was refused: another is waiting or being answered."

    def ended(self, receipt: Receipt) -> None:
        """Note the figures of an answer that has ended, whatever its end."""
        with self._lock:
            self._trouble["question"] = ""
            self._counts["questions cancelled" if receipt.finish_reason == "cancelled" else "answers"] += 1
            self._last = _figures(receipt)

    def report(self, phase: str, dropped: int) -> DiagnosticReport:
        """Return the state of things as a report. `phase`: what the node is doing; `dropped`: frames that its feed has dropped."""
        with self._lock:
            level = ERROR if self._trouble["question"] else WARN if self._trouble["frame"] else OK
            counts = self._counts | {"frames dropped": self._counts["frames dropped"] + dropped}
            values = {"phase": phase} | {name: str(count) for name, count in counts.items()}
            values["newest frame came ms ago"] = "" if self._arrived is None else _ms(1e3 * (time.monotonic() - self._arrived))
            values |= self._last | {"last error": self._error}
            message = self._trouble["question"] or self._trouble["frame"] or phase
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
        "kept tokens": f"{kept:.1f}",  # the mean over the layers
    }


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.1f}"
