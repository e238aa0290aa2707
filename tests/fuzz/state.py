"""What a process that fuzzes is doing, in a file that outlives it: counts, and the case that it runs."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_HEAD = struct.Struct("<QQdQ")  # cases, those taken, the slowest in seconds, bytes of the case
_MOST = 4 << 20


class State:
    """The file, written by the process that fuzzes and read by the one that watches it."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(_HEAD.size + _MOST))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    @property
    def counts(self) -> tuple[int, int, float]:
        """Cases so far, how many of them were taken, and seconds of the slowest."""
        cases, taken, slowest, _ = _HEAD.unpack_from(self._map)
        return cases, taken, slowest

    @property
    def case(self) -> bytes:
        """The case that is run now, or was run last."""
        length = _HEAD.unpack_from(self._map)[3]
        return self._map[_HEAD.size : _HEAD.size + length]

    def begin(self, data: bytes) -> None:
        """Note the next case before it is run."""
        cases, taken, slowest, _ = _HEAD.unpack_from(self._map)
        held = data[:_MOST]
        self._map[_HEAD.size : _HEAD.size + len(held)] = held
        _HEAD.pack_into(self._map, 0, cases + 1, taken, slowest, len(held))

    def end(self, taken: bool, seconds: float) -> None:
        """Note what came of it."""
        cases, before, slowest, length = _HEAD.unpack_from(self._map)
        _HEAD.pack_into(self._map, 0, cases, before + taken, max(slowest, seconds), length)
