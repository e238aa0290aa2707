"""The ways of clients in good form: they wait, they go away, they are slow. Each function makes one request."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from soaking.outcomes import CROSSED, CUT, GONE, LOST, Outcome, begins_right, judged, refusal
from soaking.pool import Entry, Pool
from soaking.wire import Line, Place, error_code

DEADLINES = (15, 60, 200, 1000, 5000)  # ms


@dataclass(frozen=True)
class Asking:
    """What one request is drawn from."""

    place: Place
    pool: Pool
    entry: Entry
    lot: random.Random
    outcome: Outcome


def drawn_options(asking: Asking, *, deadlines: bool = True) -> dict[str, Any]:
    """Draw what a request says beside its question."""
    lot, options = asking.lot, dict[str, Any]()
    if deadlines and lot.random() < 0.15:
        options["deadline_ms"] = lot.choice(DEADLINES)
    if lot.random() < 0.05:
        options["kept"] = True
    if lot.random() < 0.1:
        options["model"] = asking.pool.model
    asking.outcome.options = dict(options)
    return options


def whole(asking: Asking) -> Outcome:
    """Wait for a whole answer."""
    options = drawn_options(asking)
    line = Line(asking.place)
    try:
        line.ask(asking.pool.body(asking.entry, **options))
        return _read_whole(asking, line, "deadline_ms" in options)
    finally:
        line.leave()


def slow_upload(asking: Asking) -> Outcome:
    """Send the body in chunks, with pauses, and wait for the answer."""
    lot, body = asking.lot, json.dumps(asking.pool.body(asking.entry)).encode()
    line = Line(asking.place)
    try:
        line.send_head(None)
        step = max(1, len(body) // lot.randint(2, 12))
        for at in range(0, len(body), step):
            part = body[at : at + step]
            line.send(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            time.sleep(lot.uniform(0, 0.1))
        line.send(b"0\r\n\r\n")
        return _read_whole(asking, line, False)
    except (BrokenPipeError, ConnectionResetError):
        # A full server answers before the body is there, and does not read the rest of it.
        return _early(asking, line)
    finally:
        line.leave()


def _early(asking: Asking, line: Line) -> Outcome:
    outcome = asking.outcome
    try:
        status = line.status()
    except OSError:
        outcome.doubtful += 1
        return outcome.end(LOST, "reset while it sent its body")
    outcome.statuses.append(status)
    return refusal(outcome, status, None, line.header("retry-after"), False)


def stream(asking: Asking) -> Outcome:
    """Read a stream to its end."""
    return _streamed(asking, drawn_options(asking), lambda count: False)


def slow_reader(asking: Asking) -> Outcome:
    """Read a stream, and rest now and then."""

    def rest(count: int) -> bool:
        time.sleep(asking.lot.uniform(0, 0.15))
        return False

    return _streamed(asking, drawn_options(asking, deadlines=False), rest)


def cancel(asking: Asking) -> Outcome:
    """Go away after some pieces of a stream."""
    most = asking.lot.randint(0, 12)
    return _streamed(asking, drawn_options(asking, deadlines=False), lambda count: count >= most)


def leave(asking: Asking) -> Outcome:
    """Ask for a whole answer or a stream, and go away while waiting; with or without a goodbye."""
    lot, outcome, reset = asking.lot, asking.outcome, asking.lot.random() < 0.5
    options = drawn_options(asking) | {"stream": lot.random() < 0.5}
    line = Line(asking.place)
    line.ask(asking.pool.body(asking.entry, **options))
    time.sleep(lot.choice((0.0, 0.0, lot.uniform(0, 0.05), lot.uniform(0, 1.0))))
    outcome.port, outcome.closed = line.port, line.leave(reset=reset)
    # What was sent is read in order, unless a reset came before the server had looked.
    outcome.unseen, outcome.doubtful = (0, 1) if reset else (1, 0)
    return outcome.end(GONE, "reset" if reset else "closed")


def half(asking: Asking) -> Outcome:
    """Go away before the body or in the middle of it; with or without a goodbye."""
    lot, outcome = asking.lot, asking.outcome
    body = json.dumps(asking.pool.body(asking.entry)).encode()
    line = Line(asking.place)
    line.send_head(len(body))
    if lot.random() < 0.6:
        line.send(body[: lot.randrange(1, len(body))])
    time.sleep(lot.choice((0.0, lot.uniform(0, 0.3))))
    line.leave(reset=lot.random() < 0.7)
    outcome.doubtful = 1
    return outcome.end(GONE, "half a request")


def _read_whole(asking: Asking, line: Line, deadline: bool) -> Outcome:
    outcome, status = asking.outcome, line.status()
    outcome.statuses.append(status)
    data = line.json()
    if status != 200:
        return refusal(outcome, status, error_code(data), line.header("retry-after"), deadline)
    outcome.answer_id = data["id"]
    (choice,) = data["choices"]
    return judged(outcome, asking.pool, asking.entry, choice["message"]["content"], data["edgeprune"], deadline)


def _streamed(asking: Asking, options: Mapping[str, Any], enough: Callable[[int], bool]) -> Outcome:
    outcome, deadline = asking.outcome, "deadline_ms" in options
    line = Line(asking.place)
    try:
        line.ask(
            asking.pool.body(asking.entry, **options, stream=True, stream_options={"include_usage": asking.lot.random() < 0.3})
        )
        status = line.status()
        outcome.statuses.append(status)
        if status != 200:
            return refusal(outcome, status, error_code(line.json()), line.header("retry-after"), deadline)
        read = Reading(asking)
        for chunk in line.events():
            if not read.take(chunk) or read.done:
                break
            if enough(read.pieces):
                outcome.port, outcome.closed = line.port, line.leave()
                return read.left()
        return read.judge(deadline)
    finally:
        line.leave()


class Reading:
    """The chunks of a stream as they come."""

    def __init__(self, asking: Asking) -> None:
        self._asking, self._outcome = asking, asking.outcome
        self._ids = set[str]()
        self._account: Mapping[str, Any] | None = None
        self._error: str | None = None
        self.text, self.pieces, self.done = "", 0, False

    def take(self, chunk: Any) -> bool:
        """Take in one chunk, None for [DONE]; tell whether more can come."""
        if chunk is None:
            self.done = True
            return False
        if "error" in chunk:
            self._error = f"an error amid the stream: {chunk['error']}"
            return False
        self._ids.add(chunk["id"])
        self._outcome.answer_id = chunk["id"]
        for choice in chunk["choices"]:
            if words := choice["delta"].get("content"):
                self.text += words
                self.pieces += 1
        if "reused" in chunk.get("edgeprune", ()):
            self._account = chunk["edgeprune"]
        self._outcome.pieces = self.pieces
        return True

    def left(self) -> Outcome:
        """Judge what came before the client went away."""
        if len(self._ids) > 1 or not begins_right(self._asking.entry, self.text):
            return self._outcome.end(CROSSED, f"begins with {self.text!r}")
        return self._outcome.end(CUT)

    def judge(self, deadline: bool) -> Outcome:
        """Judge a stream that has ended."""
        if self._error or not self.done or self._account is None:
            return self._outcome.end(LOST, self._error or f"the stream broke off after {self.text!r}")
        if len(self._ids) > 1:
            return self._outcome.end(CROSSED, "chunks of two answers in one stream")
        return judged(self._outcome, self._asking.pool, self._asking.entry, self.text, self._account, deadline)
