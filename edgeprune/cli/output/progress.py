"""How far a long command is, on stderr: a live line in a terminal; without one a line after five seconds, then every ten."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

_FIRST, _NEXT = 5.0, 10.0  # seconds until a line is printed without a terminal, and between two
_BAR = 30  # columns


class _Count(Protocol):
    def __call__(self, done: int, note: str = "") -> None: ...


class _Work:
    """Work that began now. `total` is None if nobody knows how much it is."""

    def __init__(self, what: str, total: int | None, clock: Callable[[], float]) -> None:
        self.what, self.total, self.done, self.note = what, total, 0, ""
        self._clock, self._began = clock, clock()
        self._first: int | None = None  # done at the first report: an interrupted run goes on from there

    def set(self, done: int, note: str = "") -> None:
        if self._first is None:
            self._first = done if done > 1 else 0
        self.done, self.note = done, note

    @property
    def seconds(self) -> float:
        return self._clock() - self._began

    @property
    def state(self) -> str:
        """As "12/48, 1:03, about 3:09 left"; without a total the time alone."""
        words = [] if self.total is None else [f"{self.done}/{self.total}"]
        words += [self.note] if self.note else []
        words.append(_clock_time(self.seconds))
        fresh = self.done - (self._first or 0)
        if self.total is not None and fresh > 0:
            words.append(f"about {_clock_time(self.seconds * (self.total - self.done) / fresh)} left")
        return ", ".join(words)


class CommandProgress:
    """Shows what a command does, as an `edgeprune.io.progress.Progress`.

    `stages`: the names that `begin` will be given, in order. The time of each is printed when it ends. `quiet`: nothing is shown.
    """

    def __init__(self, stages: Sequence[str] = (), *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._stages, self._quiet, self._clock = list(stages), quiet, clock
        self._stage: _Work | None = None
        self._work: _Work | None = None  # within the stage
        self._printed = clock() + _FIRST - _NEXT
        self._console = Console(stderr=True)
        self._live = Live(get_renderable=self._line, console=self._console, refresh_per_second=5, transient=True)
        self._ended = threading.Event()
        self._lines = threading.Thread(target=self._print_lines, daemon=True)

    def begin(self, stage: str) -> None:
        """End the current stage, print its time, and begin the next."""
        self._end()
        self._stage, self._work = _Work(stage, None, self._clock), None

    def say(self, what: str) -> None:
        """Show what is done now."""
        self._work = _Work(what, None, self._clock)

    def count(self, what: str, total: int) -> _Count:
        """Show what is done now, `total` times; return the function that sets how many are done, with a note if there is one."""
        self._work = work = _Work(what, total, self._clock)
        return work.set

    def words(self) -> str:
        """Return what is done now and how far it is; an empty text if nothing is."""
        parts = []
        if self._stage is not None:
            parts.append(f"[{self._stages.index(self._stage.what) + 1}/{len(self._stages)}] {self._stage.what}")
        parts += [self._work.what] if self._work is not None else []
        current = self._work or self._stage
        return "" if current is None else f"{', '.join(parts)}: {current.state}"

    def print_if_due(self) -> None:
        """Print a line if the last one is long ago."""
        now = self._clock()
        if now - self._printed >= _NEXT and (words := self.words()):
            self._printed = now
            self._print(words)

    def _print(self, words: str) -> None:
        self._console.print(words, highlight=False, markup=False, soft_wrap=True)

    def _print_lines(self) -> None:
        while not self._ended.wait(0.5):
            self.print_if_due()

    def _line(self) -> RenderableType:
        words = self.words()
        if not words:
            return Group()
        grid, total = Table.grid(padding=(0, 1)), None if self._work is None else self._work.total
        bar = [] if self._work is None or not total else [ProgressBar(total, self._work.done, width=_BAR)]
        grid.add_row(self._spinner, *bar, Text(words, no_wrap=True, overflow="ellipsis"))
        return grid

    def _end(self) -> None:
        if self._stage is not None and not self._quiet:
            self._print(f"{self._stage.what:16} {self._stage.seconds:6.1f} s")
            self._printed = self._clock()

    def __enter__(self) -> CommandProgress:
        self._spinner = Spinner("dots")
        if not self._quiet:
            self._live.start() if self._console.is_terminal else self._lines.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._lines.is_alive():
            self._lines.join()
        self._live.stop()
        if kind is None:
            self._end()


class EngineProgress:
    """Shows the engines that are built, from the phases that the builder reports."""

    def __init__(self, progress: CommandProgress) -> None:
        self._progress = progress
        self._graph, self._outer_phase, self._done = "", "", 0
        self._count: _Count = lambda done, note="": None

    def advance(self, graph: str, phase: str, done: float) -> None:
        """Update a graph's progress. The first reported phase is the complete build; later ones are nested in it."""
        if graph != self._graph:
            self._graph, self._outer_phase, self._done = graph, phase, 0
            self._count = self._progress.count(f"{graph}, per cent", 100)
        nested = phase != self._outer_phase
        self._done = self._done if nested else round(100 * done)
        self._count(self._done, phase if nested else "")


def _clock_time(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
