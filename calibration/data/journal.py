"""What was measured, as JSON lines, from which an interrupted run goes on.

A line has a key and a value: `[["score", "PLAN", 3], [1.0, 1.0, 1.0]]`. Lines are only ever added.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeprune.errors import EdgePruneError
from edgeprune.io.files import append_line

Key = tuple[str | int | float, ...]


class Journal:
    """Values by key. `path`: the file that keeps them; without one they are only remembered.

    A line that was cut short ends the file: it is dropped with whatever follows it, and measured again. Raises EdgePruneError for a
    file that cannot be read or written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._found = dict[Key, Any]()
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._read(path)
        except OSError as error:
            raise EdgePruneError(f"Cannot write {path}: {error.strerror}.") from error

    def _read(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.seek(0)
            whole = 0
            for line in file:
                if not self._take(line):
                    break
                whole += len(line)
            file.truncate(whole)

    def _take(self, line: bytes) -> bool:
        try:
            key, value = json.loads(line)
            self._found[tuple(key)] = value
        except (ValueError, TypeError):
            return False
        return line.endswith(b"\n")

    def get(self, *key: str | int | float) -> Any:
        """Return the value of a key, None if it has none."""
        return self._found.get(key)

    def measured(self, measure: Callable[[], float], *key: str | int | float) -> float:
        """Return the number of a key; `measure` it if it has none."""
        if key not in self._found:
            self.put(measure(), *key)
        return float(self._found[key])

    def put(self, value: Any, *key: str | int | float) -> None:
        """Keep the value of a key."""
        self._found[key] = value
        if self._path is not None:
            append_line(self._path, json.dumps([key, value]))
