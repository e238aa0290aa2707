"""CUDA and TensorRT that do nothing: they count calls and know the shapes of outputs, so that only the host's work is timed."""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from device_simulation import simulated_tensorrt

from edgeprune.device.cudart import TO_HOST, Cudart
from edgeprune.runtime.backends.tensorrt.bindings import Driver


class IdleLibrary:
    """Stands for libcudart and libcuda: every function counts its call in `calls` and succeeds. All numbers on the device are 0."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._next, self._on_host = 1 << 20, list[Any]()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        makes = {"cudaMalloc": self._allocation, "cudaHostAlloc": self._host_memory, "cudaMemcpyAsync": self._copy}
        makes["cudaGraphInstantiate"] = self._graph
        function = makes.get(name, self._nothing)(name)
        setattr(self, name, function)
        return function

    def _nothing(self, name: str) -> Callable[..., int]:
        calls = self.calls

        def nothing(*_: Any) -> int:
            calls[name] += 1
            return 0

        return nothing

    def _allocation(self, name: str) -> Callable[..., int]:
        def allocation(out: Any, size: int, *_: Any) -> int:
            self.calls[name] += 1
            out._obj.value, self._next = self._next, self._next + size + 256 - size % 256
            return 0

        return allocation

    def _graph(self, name: str) -> Callable[..., int]:
        def graph(out: Any, *_: Any) -> int:
            self.calls[name] += 1
            out._obj.value = 1
            return 0

        return graph

    def _host_memory(self, name: str) -> Callable[..., int]:
        def host_memory(out: Any, size: int, *_: Any) -> int:
            self.calls[name] += 1
            self._on_host.append(ctypes.create_string_buffer(size))
            out._obj.value = ctypes.addressof(self._on_host[-1])
            return 0

        return host_memory

    def _copy(self, name: str) -> Callable[..., int]:
        def copy(target: int, _: int, size: int, kind: int, *__: Any) -> int:
            self.calls[name] += 1
            if kind == TO_HOST:
                ctypes.memset(target, 0, size)
            return 0

        return copy


class IdleContext:
    """Like IExecutionContext: knows the shapes of its outputs."""

    def __init__(self, graph: Mapping[str, Any], calls: Counter[str]) -> None:
        self._graph, self._calls = graph, calls
        self._axes = {name: tensor["shape"] for side in ("inputs", "outputs") for name, tensor in graph[side].items()}
        self._lengths: dict[str, int] = {}
        self._known: dict[tuple[Any, ...], tuple[int, ...]] = {}

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        pass

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        self._calls["set_input_shape"] += 1
        for axis, length in zip(self._axes[name], shape, strict=True):
            if axis.__class__ is str:
                self._lengths[axis] = length
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._calls["set_tensor_address"] += 1
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        self._calls["get_tensor_shape"] += 1
        key = name, *map(self._lengths.get, ("prefix", "visual", "suffix", "length"))
        if key not in self._known:
            scope = {"Min": min, "Max": max}
            self._known[key] = tuple(
                axis if isinstance(axis, int) else eval(axis, scope, self._lengths) for axis in self._axes[name]
            )
        return self._known[key]

    def execute_async_v3(self, stream: int) -> bool:
        self._calls["execute_async_v3"] += 1
        return True


class IdleEngine:
    """Like ICudaEngine, of a plan that `simulated_plan` made."""

    def __init__(self, graph: Mapping[str, Any], calls: Counter[str]) -> None:
        self._graph, self._calls = graph, calls
        self._names = [*graph["inputs"], *graph["outputs"]]
        self.num_io_tensors, self.device_memory_size_v2 = len(self._names), 1024

    def get_tensor_name(self, index: int) -> str:
        return str(self._names[index])

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self._graph["inputs"] else "out"

    def create_execution_context(self, strategy: int = 0) -> IdleContext:
        return IdleContext(self._graph, self._calls)


def idle_driver() -> tuple[Driver, Counter[str]]:
    """Return a driver on libraries that do nothing, and the count of their calls."""
    library = IdleLibrary()
    return Driver(Cudart(library, "libcudart.so.12", (12, 6)), lambda: library), library.calls


def idle_tensorrt(calls: Counter[str]) -> Any:
    """Return a module that plays TensorRT's runtime and does nothing. It counts the calls of contexts in `calls`."""

    def engine(plan: Any) -> IdleEngine:
        return IdleEngine(json.loads(plan[:])["graph"], calls)

    nothing: Any = None
    simulated = simulated_tensorrt(nothing)
    return SimpleNamespace(
        **{**vars(simulated), "Runtime": lambda log: SimpleNamespace(deserialize_cuda_engine=engine)},
    )
