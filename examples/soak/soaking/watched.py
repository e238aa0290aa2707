"""`edgeprune serve`, as it is, with a note of every answer that was cancelled: when the server heard of it, and when it ended.

python watched.py NOTES serve BUNDLE ...
"""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

from edgeprune.cli import main as edgeprune
from edgeprune.runtime import Receipt
from edgeprune.runtime.server import completions, jobs
from edgeprune.runtime.server.jobs import AnswerJob
from edgeprune.runtime.server.service import Service

_PORT: ContextVar[int] = ContextVar("port")


class Notes:
    """One line of JSON for each cancelled answer, written when it has ended."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._lock = file, threading.Lock()
        self._ports: dict[AnswerJob, int] = {}
        self._cancelled: dict[int, dict[str, Any]] = {}  # by the identity of the receipt

    def begun(self, job: AnswerJob, port: int) -> None:
        """Remember whose job it is."""
        with self._lock:
            self._ports[job] = port

    def cancelled(self, job: AnswerJob) -> None:
        """Take down that a job is to end, if its answer runs."""
        heard, receipt = time.monotonic(), job.receipt
        with self._lock:
            port = self._ports.pop(job, None)
            if port is None or receipt is None or receipt.finish_reason != "running":
                return
            self._cancelled[id(receipt)] = {"port": port, "heard": heard, "at": receipt.generated_tokens, "held": receipt}

    def ended(self, receipt: Receipt) -> None:
        """Write down a cancelled answer's end."""
        now = time.monotonic()
        with self._lock:
            note = self._cancelled.pop(id(receipt), None)
            if note is None:
                return
            del note["held"]
            step = receipt.times.ms_per_token
            note |= {"ended": now, "tokens": receipt.generated_tokens, "step_ms": step, "finish": receipt.finish_reason}
            self._file.write(json.dumps(note) + "\n")


def watch(notes: Notes) -> None:
    """Have the server's own steps noted."""
    answer, job_on_loop, cancel, start = completions.Completions.__call__, jobs.job_on_loop, AnswerJob.cancel, Service.start

    async def answered(self: Any, scope: Any, receive: Any, send: Any) -> None:
        _PORT.set((scope["client"] or ("", 0))[1])  # there is none where it has gone already
        await answer(self, scope, receive, send)

    def job(*arguments: Any) -> Any:
        made = job_on_loop(*arguments)
        notes.begun(made[0], _PORT.get())
        return made

    def cancelled(self: AnswerJob) -> None:
        notes.cancelled(self)
        cancel(self)

    def began(self: Service) -> None:
        self.observe(notes.ended)
        start(self)

    _put(completions.Completions, "__call__", answered)
    _put(completions, "job_on_loop", job)
    _put(AnswerJob, "cancel", cancelled)
    _put(Service, "start", began)


def _put(owner: Any, name: str, value: Callable[..., Any]) -> None:
    setattr(owner, name, value)


def main() -> None:
    """Watch, and run the command."""
    faulthandler.register(signal.SIGUSR1)  # where everything stands, if it should hang
    with Path(sys.argv[1]).open("w", buffering=1) as file:
        watch(Notes(file))
        edgeprune(sys.argv[2:])


if __name__ == "__main__":
    main()
