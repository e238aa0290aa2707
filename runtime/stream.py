"""An answer while it is generated."""

from __future__ import annotations

import threading
from collections.abc import Generator

from edgeprune.runtime.backends.interface import CANCELLED, Interrupt
from edgeprune.runtime.telemetry.receipt import Receipt


class Stream:
    """An answer being generated, an iterator of pieces of text; nothing runs before the first is asked for.

    One thread reads, any thread may cancel. `text` is what was said so far; `receipt` fills as it goes and is final at the end.
    """

    def __init__(self, pieces: Generator[str], receipt: Receipt, interrupt: Interrupt) -> None:
        self._pieces, self._interrupt = pieces, interrupt
        self._reading = threading.Lock()
        self.receipt = receipt
        self.text = ""

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        with self._reading:
            piece = next(self._pieces)
            self.text += piece
            return piece

    def cancel(self) -> None:
        """Ask for the end and return at once. The reader's iteration ends within one decode step; what was said is the answer."""
        self._interrupt.fire(CANCELLED)

    def close(self) -> None:
        """Stop generating, from any thread, and wait until that has happened; what was said so far is the answer."""
        self.cancel()
        with self._reading:
            self._pieces.close()
