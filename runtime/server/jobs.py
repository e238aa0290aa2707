"""One request as a worker thread answers it, told to the event loop piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

from edgeprune.errors import EdgePruneError
from edgeprune.runtime import Receipt, Runtime, Stream
from edgeprune.runtime.server.refusals import Refusal, internal, refusal_of
from edgeprune.runtime.server.translation import Question

_log = logging.getLogger("edgeprune.server")


@dataclass(frozen=True)
class Piece:
    """The next words; the first piece says that the answer has begun."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The answer is whole."""


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    refusal: Refusal


Event = Piece | Ended | Failed


class Job:
    """A question on its way: `events` in the order in which they happen; after Ended or Failed there are none.

    `tell` brings an event to whoever waits. `queued_ms`: how long it stood in line; `receipt`: from the first piece on.
    """

    def __init__(self, question: Question, fit: str, tell: Callable[[Event], None]) -> None:
        self.question, self._fit, self._tell = question, fit, tell
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

    def refuse(self, refusal: Refusal) -> None:
        """Say that it will not be answered."""
        self._tell(Failed(refusal))

    def run(self, model: Runtime) -> None:
        """Answer, whatever happens."""
        self.queued_ms = 1e3 * (time.monotonic() - self._arrived)
        try:
            self._answer(model)
        except Refusal as refusal:
            self._tell(Failed(refusal))
        except EdgePruneError as error:
            self._tell(Failed(refusal_of(error)))
        except Exception as error:  # a bug must not end the worker; its message may hold a prompt, so it is not written down
            _log.error("%s while answering:\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            self._tell(Failed(internal()))
        else:
            self._tell(Ended())

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
            self._tell(Piece(text))

    def _in_time(self) -> Question:
        # The clock of a deadline began when the request came, not when its turn came.
        asked = self.question
        if asked.deadline_ms is None:
            return asked
        left = asked.deadline_ms - self.queued_ms
        if left <= 0:
            message = f"deadline_ms ({asked.deadline_ms:g}) passed while the request waited its turn."
            raise Refusal(503, "deadline_passed", message, param="deadline_ms", retry_after=self.queued_ms / 1e3)
        return replace(asked, deadline_ms=left)


def job_on_loop(question: Question, fit: str) -> tuple[Job, asyncio.Queue[Event]]:
    """Return a job, and the queue of the running event loop in which its events arrive."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def tell(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(events.put_nowait, event)

    return Job(question, fit, tell), events
