"""A device made up for tests: a libcudart whose memory notices every wrong access, and TensorRT played by ONNX Runtime on it.

Between the beginning and the end of a capture nothing runs: what is put on the stream becomes a graph, which runs when launched.
Calls that CUDA does not allow meanwhile fail, and the capture with them.

The simulated TensorRT is given what stands for the plan of NVIDIA's builder: a JSON of the graph's path and its profiles. It reads
inputs from the addresses that it was told, in the memory of the simulated libcudart, and writes outputs there; whatever lies
outside a block, overlaps a freed one or was never set is an error.
"""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import ptx

from edgeprune.bundle import held_as
from edgeprune.device.cudart import Cudart
from edgeprune.runtime.backends.kv_cache import bfloat16_as_float32, float32_as_bfloat16
from edgeprune.runtime.backends.tensorrt.bindings import Driver

STREAM = 77
USER_MANAGED = 2
SCRATCH = {"vision_encoder.onnx": 8192, "decoder.onnx": 20480, "vision_unpruned.onnx": 40960}  # bytes that a context needs


class SimulatedCudart:
    """Stands for libcudart: its functions take what ctypes passes. Memory is a table of blocks.

    `version` and `driver` are CUDA versions; `driver` None: none is loaded. `failing`: error codes by function. `calls`: what was
    done, in order.
    """

    def __init__(
        self,
        version: tuple[int, int] = (12, 6),
        driver: tuple[int, int] | None = (12, 6),
        failing: Mapping[str, int] | None = None,
    ) -> None:
        self.version, self.driver, self._failing = version, driver, failing or {}
        self.blocks: dict[int, bytearray] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.streams: set[int] = set()
        self.recording: list[Callable[[], object]] | None = None  # what is captured
        self.graphs: dict[int, list[Callable[[], object]]] = {}
        self.pinned: dict[int, Any] = {}
        self.modules: dict[int, str] = {}  # PTX by handle
        self.interpreting = False  # whether PTX is run as it stands, which is slow, instead of what it stands for
        self._spoiled = False
        self._next = 1 << 20

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        function = SimulatedFunction(self, name)
        setattr(self, name, function)
        return function

    def answer(self, name: str, arguments: Sequence[Any]) -> Any:
        """Run a function and return what it returns: a status, or a name."""
        needs_driver = name not in ("cudaRuntimeGetVersion", "cudaGetErrorName")
        if needs_driver and (self.driver is None or self.version > self.driver):
            return 35
        if self.recording is not None and name in ("cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaStreamSynchronize"):
            self._spoiled = True
            return 900
        if name in self._failing and name == "cudaStreamEndCapture":
            self.recording = None  # it ends a capture whatever it returns
        return self._failing.get(name) or getattr(self, f"_{name}")(*arguments)

    def do(self, call: tuple[Any, ...], work: Callable[[], object]) -> None:
        """Do some work now and note the call, or when the graph is launched that is being captured."""
        if self.recording is not None:
            self.recording.append(work)
        else:
            work()
            self.calls.append(call)

    def view(self, address: int, size: int) -> memoryview:
        """Return the memory of an access, which must lie in one living block."""
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + len(block):
                return memoryview(block)[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address} are not in any living block")

    def _cudaRuntimeGetVersion(self, out: Any) -> int:
        out._obj.value = 1000 * self.version[0] + 10 * self.version[1]
        return 0

    def _cudaGetErrorName(self, code: int) -> bytes | None:
        names = {2: "MemoryAllocation", 35: "InsufficientDriver", 100: "NoDevice", 900: "StreamCaptureUnsupported"}
        names |= {901: "StreamCaptureInvalidated"}
        return f"cudaError{names[code]}".encode() if code in names else None

    def _cudaDeviceGetAttribute(self, out: Any, attribute: int, device: int) -> int:
        out._obj.value = {75: 8, 76: 7, 16: 8}[attribute]
        return 0 if device == 0 else 101

    def _cudaStreamCreate(self, out: Any) -> int:
        out._obj.value = STREAM
        self.streams.add(STREAM)
        return 0

    def _cudaStreamSynchronize(self, stream: int) -> int:
        assert stream in self.streams
        self.calls.append(("synchronize",))
        return 0

    def _cudaStreamDestroy(self, stream: int) -> int:
        assert not self.blocks and not self.pinned, "memory is freed before the stream goes"
        assert not self.graphs and not self.modules, "graphs and kernels go before the stream"
        self.streams.remove(stream)
        return 0

    def _cudaMalloc(self, out: Any, size: int) -> int:
        assert size > 0
        address, self._next = self._next, self._next + size + (1 << 12)  # a gap, so that neighbours are never hit by chance
        self._next = -(-self._next // 256) * 256
        self.blocks[address] = bytearray(b"\xff" * size)  # no numbers: NaN
        out._obj.value = address
        self.calls.append(("allocate", size))
        return 0

    def _cudaFree(self, address: int | None) -> int:
        if address is not None:
            del self.blocks[address]
        self.calls.append(("free", address))
        return 0

    def _cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> int:
        assert stream in self.streams
        if self.recording is not None and kind != 3:
            assert self._is_pinned({1: source, 2: target}[kind], size), "a captured copy reads and writes pinned memory"

        def copy() -> None:
            if kind == 2:
                ctypes.memmove(target, bytes(self.view(source, size)), size)
            else:
                self.view(target, size)[:] = ctypes.string_at(source, size) if kind == 1 else bytes(self.view(source, size))

        self.do(({1: "upload", 2: "download", 3: "copy"}[kind], size), copy)
        return 0

    def _cudaMemsetAsync(self, target: int, value: int, size: int, stream: int) -> int:
        assert stream in self.streams
        self.do(("zero", size), lambda: self.view(target, size).__setitem__(slice(None), bytes([value]) * size))
        return 0

    def _cudaHostAlloc(self, out: Any, size: int, flags: int) -> int:
        memory = ctypes.create_string_buffer(b"\xff" * size, size)
        out._obj.value = ctypes.addressof(memory)
        self.pinned[ctypes.addressof(memory)] = memory
        return 0

    def _cudaFreeHost(self, address: int) -> int:
        del self.pinned[address]
        return 0

    def _is_pinned(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + len(memory) for start, memory in self.pinned.items())

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> int:
        assert stream in self.streams and self.recording is None and mode == 1
        self.recording, self._spoiled = [], False
        return 0

    def _cudaStreamEndCapture(self, stream: int, out: Any) -> int:
        assert self.recording is not None
        recorded, self.recording = self.recording, None
        if self._spoiled:
            return 901
        out._obj.value, self._next = self._next, self._next + 256
        self.graphs[out._obj.value] = recorded
        return 0

    def _cudaGraphInstantiate(self, out: Any, graph: int, flags: int) -> int:
        out._obj.value, self._next = self._next, self._next + 256
        self.graphs[out._obj.value] = self.graphs[graph]
        return 0

    def _cudaGraphDestroy(self, graph: int) -> int:
        del self.graphs[graph]
        return 0

    _cudaGraphExecDestroy = _cudaGraphDestroy

    def _cudaGraphLaunch(self, graph: int, stream: int) -> int:
        assert stream in self.streams
        for work in self.graphs[graph]:
            work()
        self.calls.append(("launch",))
        return 0

    def _cudaGetLastError(self) -> int:
        return 0

    def _cuModuleLoadData(self, out: Any, image: bytes) -> int:
        assert b".entry append_rows(" in image
        out._obj.value, self._next = self._next, self._next + 256
        self.modules[out._obj.value] = image.decode()
        return 0

    def _cuModuleGetFunction(self, out: Any, module: Any, name: bytes) -> int:
        assert module.value in self.modules and name == b"append_rows"
        out._obj.value = module.value
        return 0

    def _cuModuleUnload(self, module: Any) -> int:
        del self.modules[module.value]
        return 0

    def _cuLaunchKernel(self, entry: Any, blocks: int, *rest: Any) -> int:
        assert entry.value in self.modules and rest[:2] == (1, 1) and rest[6] in self.streams
        table, rows = (ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint64))[0] for pointer in rest[7])

        def append_rows() -> None:
            row = int(np.frombuffer(self.view(rows, 8), np.int64)[0])
            for source, target, words in np.frombuffer(self.view(table, 24 * blocks), np.uint64).reshape(-1, 3).tolist():
                self.view(target + 4 * row * words, 4 * words)[:] = bytes(self.view(source, 4 * words))

        threads, source = rest[2], self.modules[entry.value]
        interpreted = partial(ptx.run, source, (table, rows), blocks, threads, self.view)
        self.do(("kernel",), interpreted if self.interpreting else append_rows)
        return 0


class SimulatedFunction:
    """A function of a simulated library. It checks arguments against `argtypes`, as ctypes does."""

    def __init__(self, library: SimulatedCudart, name: str) -> None:
        self._library, self._name = library, name
        self.argtypes: Sequence[Any] = ()
        self.restype: Any = ctypes.c_int

    def __call__(self, *arguments: Any) -> Any:
        assert len(arguments) == len(self.argtypes), self._name
        for kind, argument in zip(self.argtypes, arguments, strict=True):
            kind.from_param(argument)
        answer = self._library.answer(self._name, arguments)
        assert isinstance(answer, int) == (self.restype is ctypes.c_int)
        return answer


def simulated_libraries(driver: tuple[int, int] | None, libraries: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return what opens the libraries of a machine by name: libcuda of a CUDA version, and others as given."""

    def driver_version(out: Any) -> int:
        assert driver is not None
        out._obj.value = 1000 * driver[0] + 10 * driver[1]
        return 0

    def open_library(name: str) -> Any:
        found = dict(libraries)
        if driver is not None:
            found["libcuda.so.1"] = SimpleNamespace(cuDriverGetVersion=driver_version)
        if name not in found:
            raise OSError(f"{name}: cannot open shared object file")
        return found[name]

    return open_library


class SimulatedDriver(Driver):
    """The driver on a simulated libcudart."""

    def __init__(self, library: SimulatedCudart | None = None) -> None:
        self.library = library or SimulatedCudart()
        super().__init__(Cudart(self.library, "libcudart.so.12", self.library.driver), lambda: self.library)
        self.view, self.calls = self.library.view, self.library.calls

    @property
    def blocks(self) -> dict[int, bytearray]:
        """The living blocks of memory by address."""
        return self.library.blocks

    @property
    def closed(self) -> bool:
        """Whether the stream is destroyed."""
        return not self.library.streams


class SimulatedContext:
    """Like IExecutionContext: remembers shapes and addresses of its profile, and runs on the driver's memory."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine, self._profile = engine, 0
        self._scratch = (0, 0)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._ready: dict[str, tuple[int, ...]] = {}  # the shapes of the last run outside of a capture
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        assert stream == STREAM
        self._profile = number
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        self._scratch = (memory, size)

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        low, _, high = self._engine.profiles[self._profile].get(name, (shape, shape, shape))
        self._shapes[name] = tuple(shape)
        return len(low) == len(shape) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address and address % 2 == 0
        self._addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shape(name, self._shapes)

    def _shape(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        side = self._engine.graph["inputs"] | self._engine.graph["outputs"]
        lengths = self._lengths(shapes)
        return tuple(
            axis if isinstance(axis, int) else int(eval(axis, {"Min": min, "Max": max}, lengths)) for axis in side[name]["shape"]
        )

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM and set(self._addresses) == set(self._engine.names), "every address is set"
        library, shapes, addresses = self._engine.driver.library, dict(self._shapes), dict(self._addresses)
        if library.recording is None:
            self._ready = shapes
        assert shapes == self._ready, "TensorRT prepares itself for new shapes in a run that is not captured"
        call = ("execute", Path(self._engine.plan["onnx"]).stem, self._profile)
        library.do(call, lambda: self._run(shapes, addresses))
        if self._profile < len(self._engine.profiles) - 1 or "cache_rows" not in self._engine.graph["inputs"]:
            self._addresses.clear()  # nothing but a step may rely on what was set earlier
        return True

    def _run(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        inputs = {name: self._read(name, shapes[name], addresses[name]) for name in self._engine.graph["inputs"]}
        inputs = {name: array for name, array in inputs.items() if name in self._engine.used}
        self._spoil_scratch()
        outputs = self._engine.session.run(list(self._engine.graph["outputs"]), inputs)
        kinds = [output["type"] for output in self._engine.graph["outputs"].values()]
        outputs = [float32_as_bfloat16(array) if kind == "bfloat16" else array for array, kind in zip(outputs, kinds, strict=True)]
        spans = []
        for name, array in zip(self._engine.graph["outputs"], outputs, strict=True):
            assert array.shape == self._shape(name, shapes), name
            self._engine.driver.view(addresses[name], array.nbytes)[:] = array.tobytes()
            spans.append((addresses[name], array.nbytes))
        reads = [(addresses[name], size) for name in inputs if (size := self._size(name, shapes[name]))]
        assert not any(_overlap(one, other) for one in spans for other in reads), "outputs never overwrite inputs"
        assert not any(_overlap(self._scratch, other) for other in [*spans, *reads]), "scratch memory is nobody else's"

    def _spoil_scratch(self) -> None:
        # What a context leaves in scratch memory is garbage for every other one.
        address, size = self._scratch
        assert size >= self._engine.device_memory_size_v2, "the context has enough scratch memory"
        self._engine.driver.view(address, size)[:] = b"\xee" * size

    def _read(self, name: str, shape: tuple[int, ...], address: int) -> np.ndarray:
        memory = self._engine.driver.view(address, self._size(name, shape))
        array = np.frombuffer(bytes(memory), self._kind(name)).reshape(shape)
        return bfloat16_as_float32(array) if self._engine.graph["inputs"][name]["type"] == "bfloat16" else array

    def _kind(self, name: str) -> np.dtype:
        return np.dtype(held_as(self._engine.graph["inputs"][name]["type"]))

    def _size(self, name: str, shape: tuple[int, ...]) -> int:
        return int(np.prod(shape)) * self._kind(name).itemsize

    def _lengths(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        declared = self._engine.graph["inputs"]
        return {
            axis: length
            for name, shape in shapes.items()
            for axis, length in zip(declared[name]["shape"], shape, strict=True)
            if isinstance(axis, str)
        }


class SimulatedEngine:
    """Like ICudaEngine, of a plan that `simulated_plan` made."""

    def __init__(self, plan: Mapping[str, Any], driver: SimulatedDriver) -> None:
        self.plan, self.driver, self.graph, self.profiles = plan, driver, plan["graph"], plan["profiles"]
        self.names = [*self.graph["inputs"], *self.graph["outputs"]]
        self.session = onnxruntime.InferenceSession(plan["onnx"], providers=["CPUExecutionProvider"])
        self.used = {node.name for node in self.session.get_inputs()}
        self.num_io_tensors = len(self.names)
        self.device_memory_size_v2 = SCRATCH.get(Path(plan["onnx"]).name, 1024)

    def get_tensor_name(self, index: int) -> str:
        return str(self.names[index])

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.graph["inputs"] else "out"

    def create_execution_context(self, strategy: int = 0) -> SimulatedContext:
        assert strategy == USER_MANAGED, "a context of its own scratch memory takes the most that any profile needs"
        return SimulatedContext(self)


def simulated_plan(onnx: Path, graph: Mapping[str, Any], profiles: Sequence[Any]) -> bytes:
    """Return what stands for a serialized engine."""
    return json.dumps({"onnx": str(onnx), "graph": graph, "profiles": profiles}).encode()


REFUSAL = "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine cannot run on this GPU.)"


def simulated_tensorrt(driver: SimulatedDriver) -> Any:
    """Return a module that plays TensorRT's runtime on a driver's memory."""

    class ILogger:
        Severity = IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)

        def log(self, severity: int, message: str) -> None:
            raise NotImplementedError

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: mmap.mmap) -> SimulatedEngine | None:
            assert isinstance(plan, mmap.mmap), "a plan is mapped, not read"
            if plan[:] == b"not an engine":
                self.logger.log(ILogger.Severity.ERROR, REFUSAL)
                return None
            return SimulatedEngine(json.loads(plan[:]), driver)

    modes, strategies = SimpleNamespace(INPUT="in", OUTPUT="out"), SimpleNamespace(STATIC=0, USER_MANAGED=USER_MANAGED)
    return SimpleNamespace(ILogger=ILogger, Runtime=Runtime, TensorIOMode=modes, ExecutionContextAllocationStrategy=strategies)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]
