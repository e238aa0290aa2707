"""Measure this machine: peak arithmetic and memory bandwidth, and the times of a bundle's parts.

Matrix products run in ONNX Runtime, whose kernels a bundle's graphs use too; numpy reads memory, one piece for each thread. The
best of several runs counts. The graphs of one matrix product are written as protobuf bytes, because the onnx package is no
dependency of the runtime; field numbers are those of onnx.proto.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgeprune.bundle import VISION, Bundle
from edgeprune.device.profile import PARTS, TEXT, DeviceProfile
from edgeprune.device.roofline import Peaks
from edgeprune.device.system import read_text
from edgeprune.io.protobuf import integers, message
from edgeprune.runtime.backends.interface import Backend
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache, TokenSegment
from edgeprune.runtime.backends.providers import open_backend
from edgeprune.runtime.generation.sequence import text_positions

_FLOAT, _INT8, _INT32, _FLOAT16 = 1, 3, 6, 10  # of TensorProto.DataType
_IR_VERSION, _OPSET = 8, 17  # the oldest that ONNX Runtime 1.20 and later read without a word

# By arithmetic: the type of the weight and of the input, those of the product, and its nodes as (operator, inputs, outputs).
_PRODUCTS = {
    "fp32": (np.float32, _FLOAT, _FLOAT, _FLOAT, [("MatMul", "xw", "y")]),
    "fp16": (np.float16, _FLOAT16, _FLOAT16, _FLOAT16, [("MatMul", "xw", "y")]),
    "int8": (np.int8, _INT8, _FLOAT, _INT32, [("DynamicQuantizeLinear", "x", "qsz"), ("MatMulInteger", "qwz", "y")]),
}

ARITHMETIC = ("fp32", "int8")  # what CPUs multiply in; FP16 is cast to FP32 there
_SIZE = (768, 2048, 2048)  # rows, inner size and columns of the product: large enough for every kernel, 16 MB of weights
_RUNS = 8
_CACHE = "sys/devices/system/cpu/cpu0/cache/index3/size"
_TIMES_CACHE = 4  # so many caches are read, so that none of it is in one
_LEAST, _MOST = 128 << 20, 2 << 30  # bytes to read


def product_graph(arithmetic: str, rows: int, inner: int, columns: int) -> bytes:
    """Return an ONNX model that multiplies its input "x" [rows, inner] by a constant [inner, columns] into "y".

    "int8" quantizes x to uint8 as it comes; the constant is int8 and y int32. "fp32" and "fp16" are of one type throughout.
    """
    kind, constant, given, product, nodes = _PRODUCTS[arithmetic]
    drawn = np.random.default_rng(0).integers(-60, 60, (inner, columns), np.int8).astype(kind)
    graph = b"".join(message(1, _node(*node)) for node in nodes) + message(2, b"product")
    weight = integers(1, inner, columns) + integers(2, constant) + message(8, b"w") + message(9, drawn.tobytes())
    graph += message(5, weight)
    graph += message(11, _value("x", given, rows, inner)) + message(12, _value("y", product, rows, columns))
    return integers(1, _IR_VERSION) + message(7, graph) + message(8, message(1, b"") + integers(2, _OPSET))


def _node(operator: str, inputs: str, outputs: str) -> bytes:
    names = [message(1, name.encode()) for name in inputs] + [message(2, name.encode()) for name in outputs]
    return b"".join(names) + message(4, operator.encode())


def _value(name: str, kind: int, *sizes: int) -> bytes:
    shape = b"".join(message(1, integers(1, size)) for size in sizes)
    return message(1, name.encode()) + message(2, message(1, integers(1, kind) + message(2, shape)))


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


def profile(
    bundle: Bundle, *, repeats: int = 20, threads: int | None = None, provider: str = "cpu", device: str = "this machine"
) -> DeviceProfile:
    """Return the medians of `repeats` runs of a bundle's graphs on random tokens, without pruning, and the processor's peaks.

    Raises EngineError when the provider cannot be had, or its engines were built for shorter turns than an image's tokens.
    """
    backend = open_backend(bundle, provider, threads)
    geometry, shape = bundle.plan.geometry, bundle.manifest.decoder
    rng = np.random.default_rng(0)
    takes = map(int, bundle.manifest.graphs[VISION].inputs["pixel_values"].shape)
    patches = rng.standard_normal(tuple(takes), np.float32)
    vision = _median(lambda: backend.encode_image(patches, unpruned=True), repeats)
    empty = KvCache.empty(shape)
    counts = [geometry.tokens * part // PARTS for part in range(PARTS + 1)]
    prefill = [_prefill_ms(backend, rng, count, shape.width, shape.position_axes, empty, repeats) for count in counts]
    peaks = measure_peaks(threads) if provider == "cpu" else None
    return DeviceProfile(device, "measured", geometry.tokens, vision, tuple(prefill), peaks)


def _prefill_ms(
    backend: Backend, rng: np.random.Generator, count: int, width: int, axes: int, cache: KvCache, repeats: int
) -> float:
    # As text: nothing is pruned, whatever the plan says.
    tokens = TokenSegment(rng.standard_normal((1, count + TEXT, width), np.float32), text_positions(0, count + TEXT, axes))
    nothing = TokenSegment(np.zeros((1, 0, width), np.float32), np.zeros((axes, 0), np.int64))
    step = DecoderInput(nothing, nothing, tokens, np.zeros(0, np.int64), np.zeros((count + TEXT, 3), np.float32))
    return _median(lambda: backend.forward(step, cache), repeats)


def _median(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)
