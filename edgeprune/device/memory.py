"""Memory of the machine (/proc/meminfo, /proc/swaps), the peak of this process, and malloc settings for long-running processes.

glibc creates up to eight arenas per core. After a large block is freed, it raises the size up to which blocks come from an arena
(mallopt(3), M_MMAP_THRESHOLD). If several threads allocate images and caches of many sizes, the arenas fragment and resident memory
grows for a long time. With two arenas and a fixed threshold, large blocks are mapped and unmapped individually, and memory is
constant after some minutes; docs/soak.md has the figures.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from edgeprune.device.system import read_text

NO_ZRAM = "sudo systemctl disable nvzramconfig && sudo reboot"  # the service of JetPack that makes zram of half the memory
_LINE = re.compile(r"^(\w+):\s+(\d{1,15})\s*kB", re.MULTILINE)
_SWAP = re.compile(r"^(\S+)\s+(?:partition|file)\s+(\d{1,15})\s+(\d{1,15})\s", re.MULTILINE)  # name, size and use in KiB
_ZRAM = re.compile(r"(?:^|/)zram\d+$")

_ARENA_MAX, _MMAP_THRESHOLD = -8, -3  # mallopt's parameters
_ARENAS, _LARGE_BYTES = 2, 256 << 10


@dataclass(frozen=True)
class Memory:
    """Memory in MiB; None for what the kernel does not report. CMA is the contiguous pool that an Orin's GPU allocates from.

    Swap includes zram, which is compressed memory.
    """

    total: int | None
    available: int | None
    swap_total: int | None
    swap_free: int | None
    cma_total: int | None
    cma_free: int | None
    zram_total: int | None = None
    zram_free: int | None = None

    @property
    def disk_swap_total(self) -> int | None:
        """Swap on disks; None if it is not known how much of the swap is zram."""
        return _difference(self.swap_total, self.zram_total)

    @property
    def disk_swap_free(self) -> int | None:
        """Free swap on disks; None as for `disk_swap_total`."""
        return _difference(self.swap_free, self.zram_free)


def parse_memory(meminfo: str | None, swaps: str | None) -> Memory:
    """Parse the texts of /proc/meminfo and /proc/swaps."""
    found = {name: int(kilobytes) // 1024 for name, kilobytes in _LINE.findall(meminfo or "")}
    names = ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree", "CmaTotal", "CmaFree")
    return Memory(*[*map(found.get, names), *_zram(swaps)])


def _zram(swaps: str | None) -> tuple[int | None, int | None]:
    # Total and free MiB. A file without its heading is no /proc/swaps.
    if not (swaps or "").startswith("Filename"):
        return None, None
    sizes = [(int(size), int(size) - int(used)) for name, size, used in _SWAP.findall(swaps or "") if _ZRAM.search(name)]
    return sum(size for size, _ in sizes) // 1024, sum(free for _, free in sizes) // 1024


def _difference(whole: int | None, part: int | None) -> int | None:
    return None if whole is None or part is None else max(whole - part, 0)


def peak_rss(root: Path = Path("/")) -> int | None:
    """Return the peak resident set of this process in bytes since the last `reset_peak_rss`; None if unknown."""
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
    """Reset the peak resident set of this process; return False if the kernel does not allow it."""
    try:
        (root / "proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def limit_malloc_arenas() -> None:
    """Configure glibc's allocator to prevent memory growth. Call it before threads start.

    Only our own programs call this; a library must not change its host's allocator. It does nothing if MALLOC_ARENA_MAX or
    GLIBC_TUNABLES is set, or with another C library.
    """
    import ctypes

    if "MALLOC_ARENA_MAX" in os.environ or "GLIBC_TUNABLES" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, _ARENAS)
        mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
