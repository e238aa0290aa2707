"""What this machine reaches at most: matrix products in each arithmetic, and reading memory.

Products run in ONNX Runtime, whose kernels a bundle's graphs use too; memory is read by numpy, a piece for each thread. The best of
several runs counts: a peak is what nothing disturbed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgeprune.device.roofline import Peaks
from edgeprune.device.system import read_text
from edgeprune.runtime.products import product_graph

ARITHMETIC = ("fp32", "int8")  # what CPUs multiply in; FP16 is cast to FP32 there
_SIZE = (768, 2048, 2048)  # rows, inner size and columns of the product: large enough for every kernel, 16 MB of weights
_RUNS = 8
_CACHE = "sys/devices/system/cpu/cpu0/cache/index3/size"
_TIMES_CACHE = 4  # so many caches are read, so that none of it is in one
_LEAST, _MOST = 128 << 20, 2 << 30  # bytes to read


def measure_peaks(threads: int | None = None, arithmetic: Iterable[str] = ARITHMETIC) -> Peaks:
    """Return the peaks of this machine's CPU with `threads` threads (None: one for each core that this process may use)."""
    return Peaks({name: product_rate(name, threads) for name in arithmetic}, read_rate(threads), threads)


def product_rate(arithmetic: str, threads: int | None = None) -> float:
    """Return the operations a second of a large matrix product: a multiplication and an addition are two."""
    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    rows, inner, columns = _SIZE
    graph = product_graph(arithmetic, rows, inner, columns)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feeds = {"x": np.random.default_rng(1).standard_normal((rows, inner), np.float32)}
    return 2.0 * rows * inner * columns / _best(lambda: session.run(["y"], feeds))


def read_rate(threads: int | None = None, root: Path = Path("/")) -> float:
    """Return the bytes a second that all threads read of a memory much larger than the last cache."""
    numbers = np.ones(bytes_to_read(root) // 4, np.float32)
    # Each keeps up with memory on some machines and not on others.
    return max(_rate(np.max, numbers, threads or cores()), _rate(_squared, numbers, threads or cores()))


def _squared(numbers: np.ndarray) -> Any:
    return np.dot(numbers, numbers)


def _rate(read: Callable[[np.ndarray], Any], numbers: np.ndarray, count: int) -> float:
    pieces = np.array_split(numbers, count)
    with ThreadPoolExecutor(count) as pool:
        return numbers.nbytes / _best(lambda: list(pool.map(read, pieces)))


def bytes_to_read(root: Path = Path("/")) -> int:
    """Return how much memory must be read so that no cache holds it; where the kernel does not say, for one of 32 MiB."""
    text = read_text(root, _CACHE) or ""
    kilobytes = int(text[:-1]) if text[:-1].isdigit() and text.endswith("K") else 32 << 10
    return min(max(_TIMES_CACHE * kilobytes << 10, _LEAST), _MOST)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _best(run: Callable[[], object]) -> float:
    # Seconds.
    run()
    taken = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return min(taken)
