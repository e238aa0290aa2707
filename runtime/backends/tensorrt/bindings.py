"""Import TensorRT and CUDA, or raise an error with the remedy where they are missing.

CUDA is called through a small interface, `Driver`, so that tests can replace it with host memory.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edgeprune.device.doctor import OLDEST_TENSORRT, diagnose
from edgeprune.device.machine import Machine, read_machine
from edgeprune.errors import EngineError, install_command


@dataclass(frozen=True)
class DeviceIdentity:
    """What an engine is specific to: the TensorRT version and the GPU's compute capability, such as "8.7"."""

    tensorrt: str
    capability: str


class Driver(Protocol):
    """One CUDA stream and device memory. Addresses are integers, sizes are in bytes. Operations run in call order."""

    @property
    def stream(self) -> int:
        """The stream's handle."""
        ...

    def allocate(self, size: int) -> int:
        """Allocate device memory and return its address."""
        ...

    def free(self, address: int) -> None:
        """Free device memory."""
        ...

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device."""
        ...

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the device into a contiguous array and wait for the copy."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy `size` bytes on the device."""
        ...

    def synchronize(self) -> None:
        """Wait for all pending operations."""
        ...

    def close(self) -> None:
        """Wait for the stream and destroy it."""
        ...


class CudaDriver:
    """A driver on `cuda.bindings.runtime`. Every method raises EngineError with CUDA's error name when a call fails."""

    def __init__(self, runtime: Any) -> None:
        self._cuda = runtime
        kinds = runtime.cudaMemcpyKind
        self._to_device, self._to_host = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self._on_device = kinds.cudaMemcpyDeviceToDevice
        self._stream = self._call(runtime.cudaStreamCreate)

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream)

    def allocate(self, size: int) -> int:
        """Allocate device memory and return its address."""
        return int(self._call(self._cuda.cudaMalloc, size))

    def free(self, address: int) -> None:
        """Free device memory."""
        self._call(self._cuda.cudaFree, address)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device. CUDA reads pageable memory before the call returns."""
        self._call(self._cuda.cudaMemcpyAsync, address, array.ctypes.data, array.nbytes, self._to_device, self._stream)

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the device into a contiguous array and wait for the copy."""
        self._call(self._cuda.cudaMemcpyAsync, array.ctypes.data, address, array.nbytes, self._to_host, self._stream)
        self._call(self._cuda.cudaStreamSynchronize, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy `size` bytes on the device."""
        self._call(self._cuda.cudaMemcpyAsync, target, source, size, self._on_device, self._stream)

    def synchronize(self) -> None:
        """Wait for all pending operations."""
        self._call(self._cuda.cudaStreamSynchronize, self._stream)

    def close(self) -> None:
        """Wait for the stream and destroy it."""
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
    """Import and return TensorRT. Raises EngineError with the remedy for this JetPack when it is missing or too old."""
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
    """Import and return the CUDA runtime's Python module. Raises EngineError with the install command when it is missing."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EngineError(
            "The CUDA runtime's Python package is not installed.", hint=f"Install it with: {install_command('tensorrt')}"
        ) from error


def identity(trt: Any, runtime: Any) -> DeviceIdentity:
    """Return the identity of this machine's GPU and TensorRT. `runtime` is the module that `cuda` returns."""
    attributes = runtime.cudaDeviceAttr
    numbers = []
    for attribute in (attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor):
        error, value = runtime.cudaDeviceGetAttribute(attribute, 0)
        if int(error):
            raise EngineError(f"CUDA finds no GPU ({error}).", hint="See: edgeprune doctor")
        numbers.append(str(value))
    return DeviceIdentity(str(trt.__version__), ".".join(numbers))


def _missing(machine: Machine, error: ImportError) -> str:
    # The reason and remedy that `edgeprune doctor` reports.
    blocked = next((each for each in diagnose(machine).abilities if each.name == "build TensorRT engines" and not each.able), None)
    if blocked is None:
        return f"{error}. See: edgeprune doctor"
    return f"{blocked.reason}." + (f" Remedy: {blocked.remedy}" if blocked.remedy else "")
