"""The line of requests: bounded, and fair to clients. Each client has a line of its own; they are served in turns."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from edgeprune.runtime.server.limits import Limits
from edgeprune.runtime.server.refusals import shutting_down, too_much

T = TypeVar("T")
_RECENT = 16  # answers whose times say how long the next will take
_UNKNOWN_S = 1.0  # what an answer is taken to last while none has ended


class FairQueue(Generic[T]):
    """A bounded line in front of `parallel` workers; any thread may call anything.

    A request enters before its body is read, so that bodies in memory are bounded too, and leaves when it is answered.
    """

    def __init__(self, limits: Limits, parallel: int = 1) -> None:
        self._limits, self._parallel = limits, parallel
        self._changed = threading.Condition()
        self._lines: dict[str, deque[T]] = {}  # the client whose turn it is comes first; no line is empty
        self._open: Counter[str] = Counter()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._closed = False

    @contextmanager
    def entered(self, client: str) -> Iterator[None]:
        """Hold a place for the block; raise Refusal (429) when there is none, with the seconds after which there may be one."""
        with self._changed:
            self._check_room(client)
            self._open[client] += 1
        try:
            yield
        finally:
            with self._changed:
                self._open[client] -= 1
                self._open += Counter()  # forgets those that have none

    def _check_room(self, client: str) -> None:
        total, wait = self._open.total(), self._wait()
        if self._open[client] >= self._limits.per_client:
            message = f"This client has {self._open[client]} requests open, as many as are allowed"
            raise too_much("--per-client", 429, message, retry_after=wait)
        if total >= self._limits.queue + self._parallel:
            raise too_much("--queue", 429, f"The queue is full: {total} requests are open", retry_after=wait)

    def _wait(self) -> float:
        usual = sum(self._recent) / len(self._recent) if self._recent else _UNKNOWN_S
        return usual * max(1.0, self._open.total() / self._parallel)

    @property
    def retry_after(self) -> float:
        """Seconds until all that is open now may be answered."""
        with self._changed:
            return self._wait()

    @property
    def waiting(self) -> int:
        """Requests in line."""
        with self._changed:
            return sum(map(len, self._lines.values()))

    def push(self, client: str, item: T) -> None:
        """Put a request at the end of its client's line; raise Refusal (503) after `close`."""
        with self._changed:
            if self._closed:
                raise shutting_down()
            self._lines.setdefault(client, deque()).append(item)
            self._changed.notify()

    def drop(self, client: str, item: T) -> bool:
        """Take a request out of line; tell whether it was still there."""
        with self._changed:
            line = self._lines.get(client, deque())
            if item not in line:
                return False
            line.remove(item)
            if not line:
                del self._lines[client]
            return True

    def take(self) -> T | None:
        """Return the next request, waiting for one; None after `close`. The client goes behind the others."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._closed)
            if self._closed:
                return None
            client = next(iter(self._lines))
            line = self._lines.pop(client)
            item = line.popleft()
            if line:
                self._lines[client] = line
            return item

    def answered(self, seconds: float) -> None:
        """Note how long an answer took."""
        with self._changed:
            self._recent.append(seconds)

    def close(self) -> list[T]:
        """Serve nobody any more; return who was in line."""
        with self._changed:
            self._closed = True
            left = [item for line in self._lines.values() for item in line]
            self._lines.clear()
            self._changed.notify_all()
            return left
