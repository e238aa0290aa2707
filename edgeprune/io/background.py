"""Run functions in background threads, such as hashing files while sessions are created."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class ThreadTask(Generic[T]):
    """A function without arguments that runs in a daemon thread from construction on."""

    # Not concurrent.futures: it imports logging, 5 ms of the 150 ms that importing the runtime may take.
    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the function has returned or raised."""
        self._thread.join()

    def result(self) -> T:
        """Wait for the function; return its result or raise its exception."""
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
    """Run each function in its own thread and return the results by name; raise the first error after all have ended."""
    tasks = {name: ThreadTask(function) for name, function in functions.items()}
    for task in tasks.values():
        task.wait()
    return {name: task.result() for name, task in tasks.items()}
