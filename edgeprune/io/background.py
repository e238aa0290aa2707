"""Functions that run in threads of their own, such as reading files while graphs are opened."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class ThreadTask(Generic[T]):
    """A function without arguments that runs from now on. It holds no process back from ending."""

    # concurrent.futures would do, but it imports logging: 5 ms of the 150 that importing the runtime may take.
    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the function has ended, well or not."""
        self._thread.join()

    def result(self) -> T:
        """Wait for the function; return what it returned, or raise what it raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._function())
        except BaseException as error:
            self._error = error


def run_in_threads(functions: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Run functions in a thread each and return their results by name; raise the first one's error when all have ended."""
    started = {name: ThreadTask(function) for name, function in functions.items()}
    for each in started.values():
        each.wait()
    return {name: each.result() for name, each in started.items()}
