"""One file at a time, in memory where the system has such a place: what is fuzzed reads files."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

_MEMORY, _PREFIX = Path("/dev/shm"), "edgeprune-fuzz-"


@cache
def scratch() -> Path:
    """Return this process's folder, which is removed when it ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_place()))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def forget(process: int) -> None:
    """Remove the folder of a process that ended without doing so, as libFuzzer's do."""
    for folder in _place().glob(f"{_PREFIX}{process}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _place() -> Path:
    return _MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())


def in_file(data: bytes, name: str) -> Path:
    """Return a file with this content; the next of its name takes its place."""
    path = scratch() / name
    path.write_bytes(data)
    return path
