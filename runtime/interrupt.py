"""A wish that an answer should end, from any thread: heard between two steps, and inside one where the engine can stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CANCELLED, DEADLINE = "cancelled", "deadline"


class Interrupted(Exception):
    """A computation stopped because its answer is to end. It never leaves the runtime."""


class Interrupt:
    """Whether an answer is to end, and why: `reason` is CANCELLED, DEADLINE or None. The first reason counts."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._stops: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def fire(self, reason: str) -> None:
        """Ask for the end."""
        with self._lock:
            self.reason = self.reason or reason
            stops = list(self._stops)
        for stop in stops:
            stop()

    def check(self) -> None:
        """Raise Interrupted if the end was asked for."""
        if self.reason is not None:
            raise Interrupted

    @contextmanager
    def stopping(self, stop: Callable[[], None]) -> Iterator[None]:
        """Have `stop` called when the end is asked for while the block runs, or at once if it was before."""
        with self._lock:
            self._stops.append(stop)
            fired = self.reason is not None
        if fired:
            stop()
        try:
            yield
        finally:
            with self._lock:
                self._stops.remove(stop)

    @contextmanager
    def due(self, seconds: float | None) -> Iterator[None]:
        """Fire DEADLINE when so many seconds have passed and the block still runs; None is never."""
        if seconds is None:
            yield
            return
        timer = threading.Timer(min(max(seconds, 0.0), threading.TIMEOUT_MAX), self.fire, (DEADLINE,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
