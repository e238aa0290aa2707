"""Jobs and their queue: a worker thread answers one request and sends its pieces to the event loop.

The queue is bounded. Each client has a queue of its own, and clients are served round-robin.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from edgeprune.errors import EdgePruneError
from edgeprune.runtime import Receipt, Runtime, Stream
from edgeprune.runtime.server.errors import ApiError, ServerLimits, api_error_of, internal, limit_exceeded, shutting_down
from edgeprune.runtime.server.request_mapping import AnswerRequest

_log = logging.getLogger("edgeprune.server")

T = TypeVar("T")
_RECENT = 16  # answers whose times say how long the next will take
_UNKNOWN_S = 1.0  # what an answer is taken to last while none has ended


@dataclass(frozen=True)
class TextEvent:
    """The next words; the first piece says that the answer has begun."""

    text: str


@dataclass(frozen=True)
class DoneEvent:
    """The answer is whole."""


@dataclass(frozen=True)
class ErrorEvent:
    """There is no answer, or no more of it."""

    refusal: ApiError


Event = TextEvent | DoneEvent | ErrorEvent


class AnswerJob:
    """A question on its way: `events` in the order in which they happen; after DoneEvent or ErrorEvent there are none.

    `emit` brings an event to whoever waits. `queued_ms`: how long it stood in line; `receipt`: from the first piece on.
    """

    def __init__(self, request: AnswerRequest, fit: str, emit: Callable[[Event], None]) -> None:
        self.request, self._fit, self._emit = request, fit, emit
        self.queued_ms = 0.0
        self.receipt: Receipt | None = None
        self._arrived = time.monotonic()
        self._stream: Stream | None = None
        self._cancelled = False
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """End the answer within a decode step, or before it begins."""
        with self._lock:
            self._cancelled = True
            stream = self._stream
        if stream is not None:
            stream.cancel()

    def reject(self, refusal: ApiError) -> None:
        """Say that it will not be answered."""
        self._emit(ErrorEvent(refusal))

    def run(self, model: Runtime) -> None:
        """Answer, whatever happens."""
        self.queued_ms = 1e3 * (time.monotonic() - self._arrived)
        try:
            self._answer(model)
        except ApiError as refusal:
            self._emit(ErrorEvent(refusal))
        except EdgePruneError as error:
            self._emit(ErrorEvent(api_error_of(error)))
        except Exception as error:  # a bug must not end the worker; its message may hold a prompt, so it is not written down
            _log.error("%s while answering:\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            self._emit(ErrorEvent(internal()))
        else:
            self._emit(DoneEvent())

    def _answer(self, model: Runtime) -> None:
        asked = self._in_time()
        chat = model.chat(prune=asked.prune, fit=self._fit, history=asked.history)
        stream = chat.ask(asked.prompt, asked.images or None, tier=asked.tier, deadline_ms=asked.deadline_ms, **asked.sampling)
        self.receipt = stream.receipt
        with self._lock:
            self._stream = stream
            cancelled = self._cancelled
        if cancelled:
            stream.cancel()
        for text in stream:
            self._emit(TextEvent(text))

    def _in_time(self) -> AnswerRequest:
        # The clock of a deadline began when the request came, not when its turn came.
        asked = self.request
        if asked.deadline_ms is None:
            return asked
        left = asked.deadline_ms - self.queued_ms
        if left <= 0:
            message = f"deadline_ms ({asked.deadline_ms:g}) passed while the request waited its turn."
            raise ApiError(503, "deadline_passed", message, param="deadline_ms", retry_after=self.queued_ms / 1e3)
        return replace(asked, deadline_ms=left)


def job_on_loop(request: AnswerRequest, fit: str) -> tuple[AnswerJob, asyncio.Queue[Event]]:
    """Return a job, and the queue of the running event loop in which its events arrive."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def emit(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(events.put_nowait, event)

    return AnswerJob(request, fit, emit), events


class FairQueue(Generic[T]):
    """A bounded line in front of `parallel` workers; any thread may call anything.

    A request enters before its body is read, so that bodies in memory are bounded too, and leaves when it is answered.
    """

    def __init__(self, limits: ServerLimits, parallel: int = 1) -> None:
        self._limits, self._parallel = limits, parallel
        self._changed = threading.Condition()
        self._lines: dict[str, deque[T]] = {}  # the client whose turn it is comes first; no line is empty
        self._open: Counter[str] = Counter()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._closed = False

    @contextmanager
    def admit(self, client: str) -> Iterator[None]:
        """Hold a place for the block; raise ApiError (429) when there is none, with the seconds after which there may be one."""
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
            raise limit_exceeded("--per-client", 429, message, retry_after=wait)
        if total >= self._limits.queue + self._parallel:
            raise limit_exceeded("--queue", 429, f"The queue is full: {total} requests are open", retry_after=wait)

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
        """Put a request at the end of its client's line; raise ApiError (503) after `close`."""
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
