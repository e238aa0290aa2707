"""Memory of the machine (/proc/meminfo), the peak of this process, and malloc settings for long-running processes.

glibc makes up to eight heaps for each core, and takes ever larger pieces from them instead of from the system once such a piece
has been freed (mallopt(3), M_MMAP_THRESHOLD). Where several threads allocate images and caches of many sizes, the heaps fragment
and resident memory rises for a long time. With two heaps, and large pieces taken from the system and given back at once, it is
level after some minutes; docs/soak.md has the figures.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from edgeprune.device.system import read_text

_LINE = re.compile(r"^(\w+):\s+(\d{1,15})\s*kB", re.MULTILINE)

_ARENA_MAX, _MMAP_THRESHOLD = -8, -3  # mallopt's parameters
_ARENAS, _LARGE = 2, 256 << 10  # bytes


@dataclass(frozen=True)
class Memory:
    """Mebibytes; None for what the kernel does not say. `cma`: the contiguous pool that the GPU of an Orin allocates from."""

    total: int | None
    available: int | None
    swap_total: int | None
    swap_free: int | None
    cma_total: int | None
    cma_free: int | None


def parse_meminfo(text: str | None) -> Memory:
    """Return what the text of /proc/meminfo says."""
    found = {name: int(kilobytes) // 1024 for name, kilobytes in _LINE.findall(text or "")}
    names = ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree", "CmaTotal", "CmaFree")
    return Memory(*(found.get(name) for name in names))


def peak_rss(root: Path = Path("/")) -> int | None:
    """Return the bytes of the largest resident set of this process since the last `reset_peak_rss`; None where nobody knows."""
    found = re.search(r"^VmHWM:\s+(\d+)\s*kB", read_text(root, "proc/self/status") or "", re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_rss(root: Path = Path("/")) -> bool:
    """Begin the peak of this process anew; return False where the kernel does not let it."""
    try:
        (root / "proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def limit_malloc_arenas() -> None:
    """Set glibc's allocator so that memory stays flat; to be called before there are threads.

    For programs of our own alone: what another program does with its memory is not ours to say. Whoever sets MALLOC_ARENA_MAX or
    GLIBC_TUNABLES has decided already, and another C library has no such settings: then nothing happens.
    """
    import ctypes

    if "MALLOC_ARENA_MAX" in os.environ or "GLIBC_TUNABLES" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, _ARENAS)
        mallopt(_MMAP_THRESHOLD, _LARGE)
