"""Doubles of a model and of a listener, for the node without its transport."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from edgeprune.errors import UsageError
from edgeprune.runtime.media.feed import Feed, Shot
from edgeprune.runtime.ros2.answerer import OutputCallbacks, QuestionWorker
from edgeprune.runtime.ros2.diagnostics import DiagnosticReport
from edgeprune.runtime.telemetry.receipt import Receipt, Times

WAIT = 10.0


class FakeStream:
    """Says the number of its frame, then waits to be let on, then says its question."""

    def __init__(self, question: str, frame: int, receipt: Receipt, gate: threading.Event) -> None:
        self.receipt, self.text = receipt, ""
        self._pieces, self._gate = [f"{frame}:", question, ""], gate
        self._cancelled = threading.Event()

    def __iter__(self) -> FakeStream:
        return self

    def __next__(self) -> str:
        if self.text and len(self._pieces) == 2:
            assert self._gate.wait(WAIT)
        if self._cancelled.is_set() or not self._pieces:
            self.receipt.finish_reason = "cancelled" if self._cancelled.is_set() else "end"
            raise StopIteration
        piece = self._pieces.pop(0)
        self.text += piece
        return piece

    def cancel(self) -> None:
        self._cancelled.set()
        self._gate.set()


class FakeModel:
    """Has the names that the node uses of Runtime."""

    kind = "image"
    tiers = ("high", "low")
    plan = SimpleNamespace(geometry=SimpleNamespace(frames=1, fps=0.0))

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.shots: list[Shot] = []
        self.options: dict[str, Any] = {}
        self.gate = threading.Event()
        self.gate.set()

    def ask_latest(self, feed: Feed, prompt: str, *, timeout: float, **options: Any) -> FakeStream:
        shot = feed.take(timeout=timeout)
        self.shots.append(shot)
        if not prompt.strip():
            raise UsageError("The prompt is empty.")
        if prompt == "bug":
            raise RuntimeError("a bug")
        frame = int(np.asarray(shot.frames[0])[0, 0])
        self.asked.append((prompt, frame))
        self.options = options
        times = Times(prefill_ms=12.0, decode_ms=[2.0, 3.0, 4.0])
        receipt = Receipt(True, "", visual_tokens=8, visual_whole=32, visual_stored=20, generated_tokens=4, times=times)
        receipt.frames_dropped = shot.dropped
        return FakeStream(prompt, frame, receipt, self.gate)


class Listener:
    """Collects what comes out, and waits for it."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.answers: list[str] = []
        self.reports: list[DiagnosticReport] = []
        self._changed = threading.Condition()

    def outlets(self) -> OutputCallbacks:
        return OutputCallbacks(*(self._collector(kept) for kept in (self.pieces, self.answers, self.reports)))

    def _collector(self, kept: list[Any]) -> Callable[[Any], None]:
        def collect(item: Any) -> None:
            with self._changed:
                kept.append(item)
                self._changed.notify_all()

        return collect

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, WAIT), (self.pieces, self.answers, self.reports[-1:])

    def wait_for_value(self, name: str, value: str) -> dict[str, str]:
        self.wait_for(lambda: any(dict(report.values).get(name) == value for report in self.reports))
        return next(values for report in self.reports if (values := dict(report.values)).get(name) == value)

    @property
    def values(self) -> dict[str, str]:
        return dict(self.reports[-1].values)


def header(seconds: float = 0.0) -> Any:
    whole = int(seconds)
    return SimpleNamespace(stamp=SimpleNamespace(sec=whole, nanosec=round(1e9 * (seconds - whole))))


def frame(number: int, stamp: float = 0.0) -> Any:
    pixels = bytes([number] * 4)
    return SimpleNamespace(header=header(stamp), encoding="mono8", height=2, width=2, step=2, is_bigendian=0, data=pixels)


@contextmanager
def answering(model: Any, **options: Any) -> Iterator[tuple[QuestionWorker, Listener]]:
    listener = Listener()
    answerer = QuestionWorker(lambda on_phase: model, listener.outlets(), **({"frame_timeout": WAIT} | options))
    answerer.start()
    try:
        listener.wait_for_value("phase", "ready")
        yield answerer, listener
    finally:
        answerer.close()
