"""Measure this machine: peaks of arithmetic and bandwidth, times of a bundle's vision encoder and prefill, nodes in a step.

Matrix products run in ONNX Runtime, with the same kernels as a bundle's graphs. numpy reads memory, one piece per thread. The best
of several runs counts. The graph of a matrix product is written as protobuf bytes, because the runtime does not depend on the onnx
package; field numbers are those of onnx.proto.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgeprune.bundle import VISION, Bundle, DecoderShape
from edgeprune.bundle.signing import TrustedKeys
from edgeprune.device.profile import PARTS, TEXT, DeviceProfile
from edgeprune.device.roofline import Peaks
from edgeprune.device.system import read_text
from edgeprune.io.progress import SILENT, Progress
from edgeprune.io.protobuf import integers, message
from edgeprune.runtime.backends.kv_cache import GENERATED, INSTRUCTION, DecoderInput, KvCache, TokenSegment
from edgeprune.runtime.backends.onnxruntime import nodes_run
from edgeprune.runtime.backends.providers import ONNXRUNTIME, open_backend
from edgeprune.runtime.generation.sequence import text_positions

_FLOAT, _INT8, _INT32, _FLOAT16 = 1, 3, 6, 10  # of TensorProto.DataType
_IR_VERSION, _OPSET = 8, 17  # the oldest that ONNX Runtime 1.20 and later read without a warning

# By arithmetic: numpy and ONNX type of the weight, ONNX types of input and output, and nodes as (operator, inputs, outputs).
_PRODUCTS = {
    "fp32": (np.float32, _FLOAT, _FLOAT, _FLOAT, [("MatMul", "xw", "y")]),
    "fp16": (np.float16, _FLOAT16, _FLOAT16, _FLOAT16, [("MatMul", "xw", "y")]),
    "int8": (np.int8, _INT8, _FLOAT, _INT32, [("DynamicQuantizeLinear", "x", "qsz"), ("MatMulInteger", "qwz", "y")]),
}

ARITHMETIC = ("fp32", "int8")  # supported by CPUs, where FP16 is cast to FP32
_SIZE = (768, 2048, 2048)  # rows, inner size and columns: large enough for every kernel, 16 MB of weights
_RUNS = 8
_CACHE = "sys/devices/system/cpu/cpu0/cache/index3/size"
_TIMES_CACHE = 4  # read a multiple of the cache size, so that no cache holds the data
_MIN_BYTES, _MAX_BYTES = 128 << 20, 2 << 30  # to read


def product_graph(arithmetic: str, rows: int, inner: int, columns: int) -> bytes:
    """Return an ONNX model that multiplies its input "x" [rows, inner] by a constant [inner, columns] into "y".

    "int8": x is float32 and quantized to uint8 in the graph, the constant is int8, y is int32. Otherwise all have the same type.
    """
    dtype, weight_type, input_type, output_type, nodes = _PRODUCTS[arithmetic]
    values = np.random.default_rng(0).integers(-60, 60, (inner, columns), np.int8).astype(dtype)
    graph = b"".join(message(1, _node(*node)) for node in nodes) + message(2, b"product")
    weight = integers(1, inner, columns) + integers(2, weight_type) + message(8, b"w") + message(9, values.tobytes())
    graph += message(5, weight)
    graph += message(11, _value_info("x", input_type, rows, inner)) + message(12, _value_info("y", output_type, rows, columns))
    return integers(1, _IR_VERSION) + message(7, graph) + message(8, message(1, b"") + integers(2, _OPSET))


def _node(operator: str, inputs: str, outputs: str) -> bytes:
    names = [message(1, name.encode()) for name in inputs] + [message(2, name.encode()) for name in outputs]
    return b"".join(names) + message(4, operator.encode())


def _value_info(name: str, kind: int, *sizes: int) -> bytes:
    shape = b"".join(message(1, integers(1, size)) for size in sizes)
    return message(1, name.encode()) + message(2, message(1, integers(1, kind) + message(2, shape)))


def measure_peaks(threads: int | None = None, arithmetic: Iterable[str] = ARITHMETIC) -> Peaks:
    """Measure the peaks of this machine's CPU with `threads` threads (None: one per core that this process may use)."""
    return Peaks({name: product_rate(name, threads) for name in arithmetic}, read_rate(threads), threads)


def product_rate(arithmetic: str, threads: int | None = None) -> float:
    """Return the operations per second of a large matrix product; a multiply-add counts as two."""
    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    rows, inner, columns = _SIZE
    graph = product_graph(arithmetic, rows, inner, columns)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feeds = {"x": np.random.default_rng(1).standard_normal((rows, inner), np.float32)}
    return 2.0 * rows * inner * columns / _best_seconds(lambda: session.run(["y"], feeds))


def read_rate(threads: int | None = None, root: Path = Path("/")) -> float:
    """Return the bytes per second that all threads read from an array much larger than the last-level cache."""
    numbers = np.ones(bytes_to_read(root) // 4, np.float32)
    # Which of the two reaches the memory bandwidth depends on the machine.
    return max(_rate(np.max, numbers, threads or cores()), _rate(_sum_of_squares, numbers, threads or cores()))


def _sum_of_squares(numbers: np.ndarray) -> Any:
    return np.dot(numbers, numbers)


def _rate(read: Callable[[np.ndarray], Any], numbers: np.ndarray, count: int) -> float:
    pieces = np.array_split(numbers, count)
    with ThreadPoolExecutor(count) as pool:
        return numbers.nbytes / _best_seconds(lambda: list(pool.map(read, pieces)))


def bytes_to_read(root: Path = Path("/")) -> int:
    """Return how many bytes to read so that no cache holds them; assumes a cache of 32 MiB if its size is unknown."""
    text = read_text(root, _CACHE) or ""
    kilobytes = int(text[:-1]) if text[:-1].isdigit() and text.endswith("K") else 32 << 10
    return min(max(_TIMES_CACHE * kilobytes << 10, _MIN_BYTES), _MAX_BYTES)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _best_seconds(run: Callable[[], object]) -> float:
    # Returns seconds.
    run()
    seconds = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def profile(
    bundle: Bundle,
    *,
    repeats: int = 20,
    threads: int | None = None,
    provider: str = "cpu",
    trust: TrustedKeys = (),
    device: str = "this machine",
    progress: Progress = SILENT,
) -> DeviceProfile:
    """Return the medians of `repeats` unpruned runs of a bundle's graphs on random inputs, and the processor's peaks.

    `trust`: as in `edgeprune.runtime.load`. Raises EngineError if the provider is not available, or if its engines were built for
    fewer tokens per turn than an image has.
    """
    backend = open_backend(bundle, provider, threads, trust)
    geometry, shape = bundle.plan.geometry, bundle.manifest.decoder
    rng = np.random.default_rng(0)
    patch_shape = map(int, bundle.manifest.graphs[VISION].inputs["pixel_values"].shape)
    patches = rng.standard_normal(tuple(patch_shape), np.float32)
    progress.say("vision encoder")
    vision = _median_ms(lambda: backend.encode_image(patches, unpruned=True), repeats)
    empty = KvCache.empty(shape, bundle.plan)
    counts = [geometry.tokens * part // PARTS for part in range(PARTS + 1)]
    measured, prefill = progress.count("prefill lengths", len(counts)), list[float]()
    for count in counts:
        step = _text_input(shape, rng, count + TEXT)
        prefill.append(_median_ms(partial(backend.forward, step, empty), repeats))
        measured(len(prefill))
    progress.say("peaks of the processor")
    peaks = measure_peaks(threads) if provider == "cpu" else None
    return DeviceProfile(device, "measured", geometry.tokens, vision, tuple(prefill), peaks)


def step_nodes(bundle: Bundle, provider: str = "cpu", threads: int | None = None) -> int | None:
    """Return how many nodes of a bundle's decoder run in a decode step on ONNX Runtime; None on TensorRT engines.

    Raises EngineError if the provider is not available. The number is the same for any length of the KV cache.
    """
    if provider not in ONNXRUNTIME:
        return None
    shape, cache = bundle.manifest.decoder, KvCache.empty(bundle.manifest.decoder, bundle.plan)
    # A generated token behind one of the prompt.
    cache = cache.append(tuple(np.zeros_like(rows) for rows in cache.buffers), 0, 1, cache.states)
    groups = np.eye(3, dtype=np.float32)[[INSTRUCTION, GENERATED]]
    step = replace(_text_input(shape, np.random.default_rng(0), 1), text_groups=groups)
    return nodes_run(bundle, step, cache, threads, providers=ONNXRUNTIME[provider])


def _text_input(shape: DecoderShape, rng: np.random.Generator, count: int) -> DecoderInput:
    # Tokens of text, which no plan prunes.
    axes, embeds = shape.position_axes, rng.standard_normal((1, count, shape.width), np.float32)
    nothing = TokenSegment(np.zeros((1, 0, shape.width), np.float32), np.zeros((axes, 0), np.int64))
    tokens = TokenSegment(embeds, text_positions(0, count, axes))
    return DecoderInput(nothing, nothing, tokens, np.zeros(0, np.int64), np.zeros((count, 3), np.float32))


def _median_ms(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)
