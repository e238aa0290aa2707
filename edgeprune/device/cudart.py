"""Load the machine's CUDA runtime library, libcudart, and call it through ctypes.

Engines need 19 of its functions, whose symbols and arguments are the same in CUDA 12 and 13. A runtime must not be newer than the
NVIDIA driver: on a Jetson it then returns error 35 (cudaErrorInsufficientDriver), within one major version too. JetPack's own
library fits its driver. Python packages with a runtime inside, such as cuda-bindings, follow their own versions.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from edgeprune.errors import EngineError

TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
CAPABILITY_MAJOR, CAPABILITY_MINOR, MULTIPROCESSORS = 75, 76, 16  # cudaDeviceAttr
_OUT_OF_MEMORY, _INSUFFICIENT_DRIVER, _NEWER_DRIVER_NEEDED = 2, 35, 36  # cudaError

THREAD_LOCAL = 1  # cudaStreamCaptureMode: other threads may allocate meanwhile

_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_FUNCTIONS = {
    "cudaRuntimeGetVersion": (_POINTER,),
    "cudaDeviceGetAttribute": (_POINTER, _INT, _INT),
    "cudaStreamCreate": (_POINTER,),
    "cudaStreamSynchronize": (_POINTER,),
    "cudaStreamDestroy": (_POINTER,),
    "cudaMalloc": (_POINTER, _SIZE),
    "cudaFree": (_POINTER,),
    "cudaHostAlloc": (_POINTER, _SIZE, ctypes.c_uint),
    "cudaFreeHost": (_POINTER,),
    "cudaMemcpyAsync": (_POINTER, _POINTER, _SIZE, _INT, _POINTER),
    "cudaMemsetAsync": (_POINTER, _INT, _SIZE, _POINTER),
    "cudaStreamBeginCapture": (_POINTER, _INT),
    "cudaStreamEndCapture": (_POINTER, _POINTER),
    "cudaGraphInstantiate": (_POINTER, _POINTER, ctypes.c_ulonglong),
    "cudaGraphLaunch": (_POINTER, _POINTER),
    "cudaGraphDestroy": (_POINTER,),
    "cudaGraphExecDestroy": (_POINTER,),
    "cudaGetLastError": (),
    "cudaGetErrorName": (_INT,),
}
_MAJORS = (13, 12)
_IN_SYSTEM = (
    "usr/local/cuda*/targets/*/lib/libcudart.so.*",
    "usr/local/cuda*/lib64/libcudart.so.*",
    "usr/lib/*-linux-gnu/libcudart.so.*",
)
_IN_WHEELS = ("nvidia/cu[0-9]*/lib/libcudart.so.*", "nvidia/cuda_runtime/lib/libcudart.so.*")

Opener = Callable[[str], Any]  # returns a library by name or path; raises OSError if there is none
Version = tuple[int, int]


class Cudart:
    """A CUDA runtime library. `name`: its file or soname. `driver`: the CUDA version of the driver; None without a driver.

    Raises AttributeError when a function is missing.
    """

    def __init__(self, library: Any, name: str, driver: Version | None) -> None:
        self.name, self.driver = name, driver
        self._functions = {function: getattr(library, function) for function in _FUNCTIONS}
        for function, types in _FUNCTIONS.items():
            self._functions[function].argtypes = types
        self._functions["cudaGetErrorName"].restype = ctypes.c_char_p
        self.version = _version(self.number("cudaRuntimeGetVersion"))

    @property
    def fits(self) -> bool:
        """Whether the driver is at least as new as the library."""
        return self.driver is not None and self.version <= self.driver

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function. Raises EngineError with CUDA's name of the error, both versions and the remedy."""
        error = self._functions[function](*arguments)
        if error:
            raise self._failure(function, error)

    def number(self, function: str, *arguments: Any) -> int:
        """Call a function and return the int that it stores at its first argument."""
        value = ctypes.c_int()
        self.call(function, ctypes.byref(value), *arguments)
        return value.value

    def address(self, function: str, *arguments: Any, place: int = 0) -> int:
        """Call a function and return the pointer that it stores at its first argument, or at the one in another `place`."""
        value = ctypes.c_void_p()
        self.call(function, *arguments[:place], ctypes.byref(value), *arguments[place:])
        return value.value or 0

    def forget_error(self) -> None:
        """Forget the last error, which libraries that ask for it would take for one of theirs."""
        self._functions["cudaGetLastError"]()

    def _failure(self, function: str, error: int) -> EngineError:
        name = (self._functions["cudaGetErrorName"](error) or b"unknown error").decode()
        what, hint = f"{function} failed: {name} ({error})", "See: edgeprune doctor"
        if error == _OUT_OF_MEMORY:
            hint = "Close other programs, or build with a smaller --context."
        if error in (_INSUFFICIENT_DRIVER, _NEWER_DRIVER_NEEDED):
            driver = "no NVIDIA driver is loaded" if self.driver is None else f"the NVIDIA driver is for CUDA {_text(self.driver)}"
            what, hint = f"{what}. The CUDA runtime is {_text(self.version)} ({self.name}), and {driver}", remedy_for(self.driver)
        return EngineError(f"{what}.", hint=hint)

    def __str__(self) -> str:
        return f"CUDA {_text(self.version)}, driver {_text(self.driver) if self.driver else 'none'}"


def load_cudart(names: Iterable[str] | None = None, open_library: Opener = ctypes.CDLL) -> Cudart:
    """Return the first library that fits the driver; if none does, the oldest, whose errors say so. Raises EngineError without any.

    `names`: libraries to try in order; None: what the system's linker finds, then the files in their usual places.
    """
    driver, opened = driver_version(open_library), []
    for name in library_names() if names is None else names:
        try:
            runtime = Cudart(open_library(name), name, driver)
        except (OSError, AttributeError):
            continue
        if runtime.fits:
            return runtime
        opened.append(runtime)
    if not opened:
        found = "no NVIDIA driver is loaded" if driver is None else f"the NVIDIA driver is for CUDA {_text(driver)}"
        raise EngineError(f"There is no CUDA runtime library (libcudart.so.12 or .13), and {found}.", hint=remedy_for(driver))
    return min(opened, key=lambda runtime: runtime.version)


def driver_version(open_library: Opener = ctypes.CDLL) -> Version | None:
    """Return the CUDA version that the NVIDIA driver supports; None without a driver. Does not touch the GPU."""
    value = ctypes.c_int()
    try:
        error = open_library("libcuda.so.1").cuDriverGetVersion(ctypes.byref(value))
    except (OSError, AttributeError):
        return None
    return None if error else _version(value.value)


def library_files(root: Path = Path("/")) -> list[Path]:
    """Return the system's libcudart files below `root`, with their links."""
    return [path for pattern in _IN_SYSTEM for path in root.glob(pattern)]


def library_names() -> list[str]:
    """Return the names under which libcudart may be loaded: by the linker first, then by path, newer names first."""
    sonames = [f"libcudart.so.{major}" for major in _MAJORS]
    wheels = [path for folder in filter(None, sys.path) for pattern in _IN_WHEELS for path in Path(folder).glob(pattern)]
    files = [path for path in (*library_files(), *wheels) if path.name in sonames]
    return [*sonames, *(str(path) for path in sorted(files, key=lambda path: sonames.index(path.name)))]


def remedy_for(driver: Version | None) -> str:
    """Return how to install a CUDA runtime for a driver, or a driver."""
    if driver is None:
        return "Install NVIDIA's driver, or start the container with it: docker run --runtime nvidia"
    if driver[0] < min(_MAJORS):
        return f"Update the NVIDIA driver: CUDA {min(_MAJORS)} or newer is needed."
    major, minor = driver if driver[0] in _MAJORS else (max(_MAJORS), 0)
    if platform.machine() == "aarch64":  # the wheels' library for aarch64 is that of servers
        return f"Install the runtime of this version: sudo apt install cuda-cudart-{major}-{minor}"
    package = "nvidia-cuda-runtime-cu12" if major == 12 else "nvidia-cuda-runtime"
    return f'Install the runtime of this version: pip install "{package}=={major}.{minor}.*"'


def _version(number: int) -> Version:
    # CUDA writes 12.6 as 12060.
    return number // 1000, number % 1000 // 10


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
