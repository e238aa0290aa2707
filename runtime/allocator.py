"""Have the C library's allocator give memory back, for processes that answer for weeks.

glibc makes up to eight heaps for each core, and takes ever larger pieces from them instead of from the system once such a piece has
been freed (mallopt(3), M_MMAP_THRESHOLD). Where several threads take and free images and caches of all sizes, what is free lies
between what is not, and further threads bring heaps of their own: the resident memory rises for a long time. With two heaps, and
everything large from the system and back to it at once, it is level after some minutes; docs/soak.md has the figures.
"""

from __future__ import annotations

import os

_ARENA_MAX, _MMAP_THRESHOLD = -8, -3  # mallopt's parameters
_ARENAS, _LARGE = 2, 256 << 10  # bytes


def hold_steady() -> None:
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
