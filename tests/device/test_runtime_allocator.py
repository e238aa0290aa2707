"""The allocator of a server: few heaps, unless whoever starts it has decided already."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from edgeprune.cli import main
from edgeprune.device import memory as allocator

# As many heaps as threads that hold something at once, and what the library says of them.
CODE = """
import ctypes, sys, threading
if sys.argv[1] == "steady":
    from edgeprune.device.memory import limit_malloc_arenas
    limit_malloc_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
meeting = threading.Barrier(7)
def take():
    libc.malloc(ctypes.c_size_t(50_000))
    meeting.wait()
    meeting.wait()
for _ in range(6):
    threading.Thread(target=take, daemon=True).start()
meeting.wait()
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
meeting.wait()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("how", "given", "most"), [("steady", {}, 2), ("plain", {}, None), ("steady", {"MALLOC_ARENA_MAX": "4"}, 4)]
)
def test_it_has_so_many_heaps(how: str, given: dict[str, str], most: int | None) -> None:
    clean = {name: text for name, text in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    command = [sys.executable, "-c", CODE, how]
    done = subprocess.run(command, env={**clean, **given}, capture_output=True, text=True, timeout=60, check=True)
    heaps = len(re.findall(r"<heap nr=", done.stdout))
    assert heaps == most if most else heaps > 4


@pytest.mark.parametrize("command", ["serve", "ros2"])
def test_whatever_answers_for_weeks_begins_with_it(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    monkeypatch.setattr(allocator, "limit_malloc_arenas", lambda: called.append(True))
    assert CliRunner().invoke(main, [command, "nowhere"]).exit_code
    assert called
