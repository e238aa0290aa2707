"""The steps at which a process changes a folder, and faults at the n-th of them. Nothing in EdgePrune knows of it.

Python tells an audit hook of every file that is opened for writing, renamed, removed, and so on, before it happens. A step lies
before each of these beneath the watched folder, and one in the midst of each `Path.write_bytes` and `Path.write_text`.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
FILLS = ("open", "os.mkdir", "write")  # what a full disk refuses
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def kill(event: str) -> None:
    """End this process as a loss of power would."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill(event: str) -> None:
    """Say that the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Points:
    """Counts the steps beneath `root`, or those of some `events`; does `fault` from step `at` on. Only one per process."""

    def __init__(self, root: Path, at: int, fault: Callable[[str], None], events: Sequence[str] = ()) -> None:
        self._root, self._at, self._fault, self._events = str(root), at, fault, events
        self.passed, self.struck, self._inside = 0, False, False

    def arm(self) -> None:
        """Count from now on."""
        sys.addaudithook(self._hear)
        for name in ("write_bytes", "write_text"):
            setattr(Path, name, self._halved(getattr(Path, name)))

    def step(self, event: str) -> None:
        """Be at a step; tests call it for what no audit hook hears."""
        if self._events and event not in self._events:
            return
        number, self.passed = self.passed, self.passed + 1
        if number >= self._at:
            self.struck = True
            self._fault(event)

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        if self._inside or not (event == "open" or event in _CHANGES):
            return
        self._inside = True
        try:
            if self._changes(event, given):
                self.step(event)
        finally:
            self._inside = False

    def _changes(self, event: str, given: tuple[Any, ...]) -> bool:
        if isinstance(given[0], int) or not os.fsdecode(given[0]).startswith(self._root):
            return False
        if event == "os.mkdir":
            return not os.path.lexists(given[0])
        return event != "open" or bool(isinstance(given[2], int) and given[2] & _WRITING)

    def _halved(self, write: Callable[..., int]) -> Callable[..., int]:
        def half_then_whole(path: Path, data: Any, *more: Any, **named: Any) -> int:
            if str(path).startswith(self._root):
                self._inside = True  # this opening of the file is no step of its own
                try:
                    write(path, data[: len(data) // 2], *more, **named)
                    self.step("write")
                finally:
                    self._inside = False
            return write(path, data, *more, **named)

        return half_then_whole
