"""Memory: what /proc/meminfo says of the machine, and the peak of this process."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from edgeprune.device.system import read_text

_LINE = re.compile(r"^(\w+):\s+(\d{1,15})\s*kB", re.MULTILINE)


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
