"""Import TensorRT, or raise an error with the remedy where it is missing; its log; the stream and memory that engines use."""

from __future__ import annotations

import importlib
import platform
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeprune.device.cudart import CAPABILITY_MAJOR, CAPABILITY_MINOR, MULTIPROCESSORS, ON_DEVICE, TO_DEVICE, TO_HOST, Cudart
from edgeprune.device.doctor import OLDEST_TENSORRT, diagnose
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

    def __init__(self, cudart: Cudart) -> None:
        self._cuda = cudart
        self.stream = cudart.address("cudaStreamCreate")

    def allocate(self, size: int) -> int:
        """Allocate device memory and return its address."""
        return self._cuda.address("cudaMalloc", size)

    def free(self, address: int) -> None:
        """Free device memory."""
        self._cuda.call("cudaFree", address)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device. CUDA reads pageable memory before the call returns."""
        self._copy(address, array.ctypes.data, array.nbytes, TO_DEVICE)

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the device into a contiguous array and wait for the copy."""
        self._copy(array.ctypes.data, address, array.nbytes, TO_HOST)
        self.synchronize()

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy `size` bytes on the device."""
        self._copy(target, source, size, ON_DEVICE)

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
