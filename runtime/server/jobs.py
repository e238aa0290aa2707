"""Jobs and their queue. A worker thread answers one request at a time and sends pieces of text to the event loop.

The queue is bounded. Each client has its own queue, and clients are served round-robin.
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
_RECENT = 16  # answers whose mean time estimates the next one
_DEFAULT_ANSWER_S = 1.0  # estimate before the first answer has ended


@dataclass(frozen=True)
class TextEvent:
    """The next piece of text. The first one marks the start of the answer."""

    text: str


@dataclass(frozen=True)
class DoneEvent:
    """The answer is complete."""


@dataclass(frozen=True)
class ErrorEvent:
    """The request failed before or during its answer."""

    refusal: ApiError


Event = TextEvent | DoneEvent | ErrorEvent


class AnswerJob:
    """One request in the queue or in a worker. DoneEvent or ErrorEvent is its last event.

    `arrived`: when the request did, in seconds of the monotonic clock. `emit`: called with each event, from any thread.
    `queued_ms`: time in the queue. `receipt`: set before the first piece.
    """

    def __init__(self, request: AnswerRequest, arrived: float, emit: Callable[[Event], None]) -> None:
        self.request, self._arrived, self._emit = request, arrived, emit
        self.queued_ms = 0.0
        self.receipt: Receipt | None = None
        self._queued = time.monotonic()
        self._stream: Stream | None = None
        self._cancelled = False
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Cancel the answer within a decode step, or before it starts."""
        with self._lock:
            self._cancelled = True
            stream = self._stream
        if stream is not None:
            stream.cancel()

    def reject(self, refusal: ApiError) -> None:
        """Fail the job without answering it."""
        self._emit(ErrorEvent(refusal))

    def run(self, model: Runtime) -> None:
        """Answer the request. Errors become events; nothing is raised."""
        self.queued_ms = 1e3 * (time.monotonic() - self._queued)
        try:
            self._answer(model)
        except ApiError as refusal:
            self._emit(ErrorEvent(refusal))
        except EdgePruneError as error:
            self._emit(ErrorEvent(api_error_of(error)))
        except Exception as error:  # a bug must not end the worker; the message may contain a prompt, so it is not logged
            _log.error("%s while answering:\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            self._emit(ErrorEvent(internal()))
        else:
            self._emit(DoneEvent())

    def _answer(self, model: Runtime) -> None:
        request = self._with_remaining_deadline()
        chat = model.chat(prune=request.prune, history=request.history)  # the images are fitted already
        stream = chat.ask(request.turn.parts, tier=request.tier, deadline_ms=request.deadline_ms, **request.sampling)
        self.receipt = stream.receipt
        with self._lock:
            self._stream = stream
            cancelled = self._cancelled
        if cancelled:
            stream.cancel()
        for text in stream:
            self._emit(TextEvent(text))

    def _with_remaining_deadline(self) -> AnswerRequest:
        # A deadline counts from the arrival of the request, so its upload, its images and the queue have taken part of it.
        request = self.request
        if request.deadline_ms is None:
            return request
        remaining = request.deadline_ms - 1e3 * (time.monotonic() - self._arrived)
        if remaining <= 0:
            message = f"deadline_ms ({request.deadline_ms:g}) passed before the answer could begin."
            raise ApiError(503, "deadline_passed", message, param="deadline_ms", retry_after=self.queued_ms / 1e3)
        return replace(request, deadline_ms=remaining)


def job_on_loop(request: AnswerRequest, arrived: float) -> tuple[AnswerJob, asyncio.Queue[Event]]:
    """Return a job and the asyncio queue that receives its events on the running event loop."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def emit(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed and nothing awaits the event
            loop.call_soon_threadsafe(events.put_nowait, event)

    return AnswerJob(request, arrived, emit), events


class FairQueue(Generic[T]):
    """A thread-safe bounded queue in front of `parallel` workers.

    A request is admitted before its body is read, which also bounds the bodies in memory. It is counted until it is answered.
    """

    def __init__(self, limits: ServerLimits, parallel: int = 1) -> None:
        self._limits, self._parallel = limits, parallel
        self._changed = threading.Condition()
        self._queues: dict[str, deque[T]] = {}  # by client, the next one to serve first; never empty
        self._open: Counter[str] = Counter()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._closed = False

    @contextmanager
    def admit(self, client: str) -> Iterator[None]:
        """Reserve a place for the duration of the block. Raises ApiError (429) with an estimated `retry_after` if none is free."""
        with self._changed:
            self._check_room(client)
            self._open[client] += 1
        try:
            yield
        finally:
            with self._changed:
                self._open[client] -= 1
                self._open += Counter()  # removes clients with a count of 0

    def _check_room(self, client: str) -> None:
        total, wait = self._open.total(), self._estimated_wait()
        if self._open[client] >= self._limits.per_client:
            message = f"This client has {self._open[client]} requests open, as many as are allowed"
            raise limit_exceeded("--per-client", 429, message, retry_after=wait)
        if total >= self._limits.queue + self._parallel:
            raise limit_exceeded("--queue", 429, f"The queue is full: {total} requests are open", retry_after=wait)

    def _estimated_wait(self) -> float:
        mean = sum(self._recent) / len(self._recent) if self._recent else _DEFAULT_ANSWER_S
        return mean * max(1.0, self._open.total() / self._parallel)

    @property
    def retry_after(self) -> float:
        """Estimated seconds until all open requests are answered."""
        with self._changed:
            return self._estimated_wait()

    @property
    def waiting(self) -> int:
        """The number of waiting requests."""
        with self._changed:
            return sum(map(len, self._queues.values()))

    def push(self, client: str, item: T) -> None:
        """Append a request to its client's queue. Raises ApiError (503) after `close`."""
        with self._changed:
            if self._closed:
                raise shutting_down()
            self._queues.setdefault(client, deque()).append(item)
            self._changed.notify()

    def drop(self, client: str, item: T) -> bool:
        """Remove a waiting request. Returns whether it was still waiting."""
        with self._changed:
            queue = self._queues.get(client, deque())
            if item not in queue:
                return False
            queue.remove(item)
            if not queue:
                del self._queues[client]
            return True

    def take(self) -> T | None:
        """Wait for the next request and return it, or None after `close`. Its client is served last from then on."""
        with self._changed:
            self._changed.wait_for(lambda: self._queues or self._closed)
            if self._closed:
                return None
            client = next(iter(self._queues))
            queue = self._queues.pop(client)
            item = queue.popleft()
            if queue:
                self._queues[client] = queue
            return item

    def answered(self, seconds: float) -> None:
        """Record how long an answer took."""
        with self._changed:
            self._recent.append(seconds)

    def close(self) -> list[T]:
        """Close the queue and return the requests that were waiting."""
        with self._changed:
            self._closed = True
            remaining = [item for queue in self._queues.values() for item in queue]
            self._queues.clear()
            self._changed.notify_all()
            return remaining
