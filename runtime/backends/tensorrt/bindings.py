"""TensorRT and CUDA of this machine, or the remedy where they are missing.

CUDA is called through a small interface, which tests replace by memory that they can inspect.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edgeprune.device.doctor import OLDEST_TENSORRT, diagnose
from edgeprune.device.machine import Machine, read_machine
from edgeprune.errors import EngineError


@dataclass(frozen=True)
class DeviceIdentity:
    """What an engine fits: a version of TensorRT and a GPU's compute capability, such as "8.7"."""

    tensorrt: str
    capability: str


class Driver(Protocol):
    """One stream, and memory on the device; addresses are integers, sizes bytes. Everything happens in the order of the calls."""

    @property
    def stream(self) -> int:
        """The stream's handle."""
        ...

    def allocate(self, size: int) -> int:
        """Return the address of new memory."""
        ...

    def free(self, address: int) -> None:
        """Give memory back."""
        ...

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device."""
        ...

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the device into a contiguous array, and wait for it."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy on the device."""
        ...

    def synchronize(self) -> None:
        """Wait for everything that was asked so far."""
        ...

    def close(self) -> None:
        """Wait for the stream and give it back."""
        ...


class CudaDriver:
    """CUDA through `cuda.bindings.runtime`; raises EngineError with CUDA's own name for what went wrong."""

    def __init__(self, runtime: Any) -> None:
        self._cuda = runtime
        kinds = runtime.cudaMemcpyKind
        self._in, self._out, self._on = (
            kinds.cudaMemcpyHostToDevice,
            kinds.cudaMemcpyDeviceToHost,
            kinds.cudaMemcpyDeviceToDevice,
        )
        self._stream = self._call(runtime.cudaStreamCreate)

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream)

    def allocate(self, size: int) -> int:
        """Return the address of new memory."""
        return int(self._call(self._cuda.cudaMalloc, size))

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call(self._cuda.cudaFree, address)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device; pageable memory is read before the call returns."""
        self._call(self._cuda.cudaMemcpyAsync, address, array.ctypes.data, array.nbytes, self._in, self._stream)

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the device into a contiguous array, and wait for it."""
        self._call(self._cuda.cudaMemcpyAsync, array.ctypes.data, address, array.nbytes, self._out, self._stream)
        self._call(self._cuda.cudaStreamSynchronize, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy on the device."""
        self._call(self._cuda.cudaMemcpyAsync, target, source, size, self._on, self._stream)

    def synchronize(self) -> None:
        """Wait for everything that was asked so far."""
        self._call(self._cuda.cudaStreamSynchronize, self._stream)

    def close(self) -> None:
        """Wait for the stream and give it back."""
        self.synchronize()
        self._call(self._cuda.cudaStreamDestroy, self._stream)

    def _call(self, function: Any, *arguments: Any) -> Any:
        error, *result = function(*arguments)
        if int(error):
            _, name = self._cuda.cudaGetErrorName(error)
            what = name.decode() if isinstance(name, bytes) else str(name)
            hint = "Close other programs, or build with a smaller --context." if "Memory" in what else "See: edgeprune doctor"
            raise EngineError(f"{function.__name__} failed: {what}.", hint=hint)
        return result[0] if result else None


def tensorrt(machine: Machine | None = None) -> Any:
    """Return TensorRT's Python module; raise EngineError saying how to get it on this JetPack."""
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise EngineError(f"TensorRT cannot be used here: {_missing(machine or read_machine(), error)}") from error
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < OLDEST_TENSORRT:
        needed = ".".join(map(str, OLDEST_TENSORRT))
        raise EngineError(f"TensorRT {trt.__version__} is too old: {needed} is needed.", hint="See: edgeprune doctor")
    return trt


def cuda() -> Any:
    """Return the CUDA runtime's Python module; raise EngineError saying how to get it."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EngineError(
            "The CUDA runtime's Python package is not installed.", hint='Install it with: pip install "edgeprune[tensorrt]"'
        ) from error


def identity(trt: Any, runtime: Any) -> DeviceIdentity:
    """Return what engines of this machine fit; `runtime` is the module that `cuda` returns."""
    name = runtime.cudaDeviceAttr
    numbers = []
    for attribute in (name.cudaDevAttrComputeCapabilityMajor, name.cudaDevAttrComputeCapabilityMinor):
        error, value = runtime.cudaDeviceGetAttribute(attribute, 0)
        if int(error):
            raise EngineError(f"CUDA finds no GPU ({error}).", hint="See: edgeprune doctor")
        numbers.append(str(value))
    return DeviceIdentity(str(trt.__version__), ".".join(numbers))


def _missing(machine: Machine, error: ImportError) -> str:
    # The doctor's own words: what blocks the build on this machine, and the command.
    blocked = next((each for each in diagnose(machine).abilities if each.name == "build TensorRT engines" and not each.able), None)
    if blocked is None:
        return f"{error}. See: edgeprune doctor"
    return f"{blocked.reason}." + (f" Remedy: {blocked.remedy}" if blocked.remedy else "")
