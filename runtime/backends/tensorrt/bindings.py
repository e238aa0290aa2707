"""Import TensorRT, or raise an error with the remedy where it is missing; its log; the stream and memory that engines use."""

from __future__ import annotations

import ctypes
import importlib
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeprune.device.cudart import (
    CAPABILITY_MAJOR,
    CAPABILITY_MINOR,
    MULTIPROCESSORS,
    ON_DEVICE,
    THREAD_LOCAL,
    TO_DEVICE,
    TO_HOST,
    Cudart,
)
from edgeprune.device.doctor import OLDEST_TENSORRT, diagnose
from edgeprune.device.kernels import Kernel
from edgeprune.device.machine import Machine, read_machine
from edgeprune.errors import EngineError, one_line

# TensorRT 8 to 10 spell "insufficient" in two ways.
_LITTLE_MEMORY = re.compile(r"insuff?icient memory|memory is insuff?icient|could not be allocated|out ?of ?memory", re.IGNORECASE)


@dataclass(frozen=True)
class DeviceIdentity:
    """What an engine is specific to: the TensorRT version and the GPU's compute capability, such as "8.7".

    `sms`: streaming multiprocessors in this power mode. An engine for another number runs, and may be slower. `processor`: the
    machine's, such as "aarch64".
    """

    tensorrt: str
    capability: str
    sms: int = field(default=0, compare=False)
    processor: str = field(default_factory=platform.machine, compare=False)


class Driver:
    """One CUDA stream and device memory. Addresses are integers, sizes are in bytes. Operations run in call order.

    Every method raises EngineError with CUDA's error name when a call fails.
    """

    def __init__(self, cudart: Cudart, open_libcuda: Callable[[], Any] = lambda: ctypes.CDLL("libcuda.so.1")) -> None:
        self._cuda, self._open_libcuda = cudart, open_libcuda
        self.stream = cudart.address("cudaStreamCreate")

    def allocate(self, size: int) -> int:
        """Allocate device memory and return its address."""
        return self._cuda.address("cudaMalloc", size)

    def free(self, address: int) -> None:
        """Free device memory."""
        self._cuda.call("cudaFree", address)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device. CUDA reads memory that is not pinned before the call returns."""
        self._copy(address, array.ctypes.data, array.nbytes, TO_DEVICE)

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the device into a contiguous array and wait for the copy."""
        self._copy(array.ctypes.data, address, array.nbytes, TO_HOST)
        self.synchronize()

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy `size` bytes on the device."""
        self._copy(target, source, size, ON_DEVICE)

    def zero(self, address: int, size: int) -> None:
        """Set `size` bytes on the device to 0."""
        self._cuda.call("cudaMemsetAsync", address, 0, size, self.stream)

    def pinned(self, size: int) -> np.ndarray:
        """Return `size` bytes of host memory that captured copies may use. They live until `unpin`."""
        address = self._cuda.address("cudaHostAlloc", size, 0)
        memory: np.ndarray = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        memory[:] = 0
        return memory

    def unpin(self, memory: np.ndarray) -> None:
        """Free what `pinned` returned."""
        self._cuda.call("cudaFreeHost", memory.ctypes.data)

    def download_pinned(self, memory: np.ndarray, address: int) -> None:
        """Copy from the device into pinned memory, when the stream gets there."""
        self._copy(memory.ctypes.data, address, memory.nbytes, TO_HOST)

    def kernel(self, ptx: str, name: str) -> Kernel:
        """Load a kernel. Raises EngineError also where there is no libcuda."""
        try:
            return Kernel(self._open_libcuda(), ptx, name)
        except (OSError, AttributeError) as error:
            raise EngineError(f"The NVIDIA driver's library cannot be used: {error}.", hint="See: edgeprune doctor") from error

    def capture(self, enqueue: Callable[[], None]) -> int:
        """Return an executable CUDA graph of what `enqueue` puts on the stream, which is not run.

        Raises EngineError when something in it cannot be captured; the stream is then as before.
        """
        self._cuda.call("cudaStreamBeginCapture", self.stream, THREAD_LOCAL)
        try:
            enqueue()
            graph = self._cuda.address("cudaStreamEndCapture", self.stream, place=1)
        except EngineError:
            with suppress(EngineError):  # it ends the capture whatever it returns
                self._cuda.address("cudaStreamEndCapture", self.stream, place=1)
            self._cuda.forget_error()
            raise
        try:
            return self._cuda.address("cudaGraphInstantiate", graph, 0)
        finally:
            self._cuda.call("cudaGraphDestroy", graph)

    def launch(self, graph: int) -> None:
        """Run an executable graph."""
        self._cuda.call("cudaGraphLaunch", graph, self.stream)

    def discard(self, graph: int) -> None:
        """Destroy an executable graph."""
        self._cuda.call("cudaGraphExecDestroy", graph)

    def synchronize(self) -> None:
        """Wait for all pending operations."""
        self._cuda.call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Wait for the stream and destroy it."""
        self.synchronize()
        self._cuda.call("cudaStreamDestroy", self.stream)

    def _copy(self, target: int, source: int, size: int, kind: int) -> None:
        self._cuda.call("cudaMemcpyAsync", target, source, size, kind, self.stream)


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


def identity(trt: Any, cudart: Cudart) -> DeviceIdentity:
    """Return the identity of this machine's GPU and TensorRT. Raises EngineError when CUDA cannot use the GPU."""
    asked = (CAPABILITY_MAJOR, CAPABILITY_MINOR, MULTIPROCESSORS)
    major, minor, sms = (cudart.number("cudaDeviceGetAttribute", attribute, 0) for attribute in asked)
    return DeviceIdentity(str(trt.__version__), f"{major}.{minor}", sms)


def recording_log(trt: Any) -> Any:
    """Return a logger that prints nothing, since the standard output belongs to answers, and keeps what errors should say.

    `first_error` and `last_error` are lines; `memory_warning` is the first of `memory_warnings` about too little memory.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.first_error = self.last_error = "no reason given."
            self.memory_warning, self.memory_warnings = "", 0

        def log(self, severity: Any, message: str) -> None:
            line = one_line(message.strip().partition("\n")[0])
            if severity <= trt.ILogger.Severity.ERROR:
                self.first_error = line if self.first_error == "no reason given." else self.first_error
                self.last_error = line
            if severity <= trt.ILogger.Severity.WARNING and _LITTLE_MEMORY.search(line):
                self.memory_warning, self.memory_warnings = self.memory_warning or line, self.memory_warnings + 1

    return Log()


def _missing(machine: Machine, error: ImportError) -> str:
    # The reason and remedy that `edgeprune doctor` reports.
    blocked = next((each for each in diagnose(machine).abilities if each.name == "build TensorRT engines" and not each.able), None)
    if blocked is None:
        return f"{error}. See: edgeprune doctor"
    return f"{blocked.reason}." + (f" Remedy: {blocked.remedy}" if blocked.remedy else "")
