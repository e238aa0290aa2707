"""The few things asked of CUDA, behind an interface that tests replace by a memory they can look into."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from edgeprune.errors import EngineError


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
