"""What an action leaves for Python's garbage collector, which runs at times of its own and knows nothing of megabytes."""

from __future__ import annotations

import gc
from collections.abc import Callable


def left_to_collect(act: Callable[[], object]) -> list[str]:
    """Run `act` once to warm up and once more; return the types of this package and of NumPy that only a collection would free."""
    act()
    gc.collect()
    gc.disable()
    try:
        act()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found = [type(item) for item in gc.garbage]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    return sorted(kind.__name__ for kind in found if kind.__module__.split(".")[0] in ("edgeprune", "numpy"))
