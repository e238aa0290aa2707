"""What long work reports to whoever shows it: a stage that begins, what it does now, and how many of how many are done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Count = Callable[[int], None]  # is given the number that are done


class NotedCount(Protocol):
    """A Count that may also be given a note on how it goes."""

    def __call__(self, done: int, note: str = "") -> None:
        """Take note of how many are done."""
        ...


class Progress(Protocol):
    """Receives how far long work is. The command line shows it (`edgeprune.cli.output.progress`)."""

    def begin(self, stage: str) -> None:
        """Take note that a stage begins, which ends the one before."""
        ...

    def say(self, what: str) -> None:
        """Take note of what is done now, if nobody knows how much of it there is."""
        ...

    def count(self, what: str, total: int) -> NotedCount:
        """Take note of what is done now, `total` times; return the function that is given the number done."""
        ...


class Silent:
    """A Progress that shows nothing."""

    def begin(self, stage: str) -> None:
        """Show nothing."""

    def say(self, what: str) -> None:
        """Show nothing."""

    def count(self, what: str, total: int) -> NotedCount:
        """Return a function that shows nothing."""
        return lambda done, note="": None


SILENT: Progress = Silent()
