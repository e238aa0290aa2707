"""Launch kernels of our own, which the NVIDIA driver compiles from PTX, through ctypes."""

from __future__ import annotations

import ctypes
from typing import Any

from edgeprune.errors import EngineError

_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_uint
_FUNCTIONS = {
    "cuModuleLoadData": (_POINTER, ctypes.c_char_p),
    "cuModuleGetFunction": (_POINTER, _POINTER, ctypes.c_char_p),
    "cuModuleUnload": (_POINTER,),
    "cuLaunchKernel": (_POINTER, *[_COUNT] * 7, _POINTER, _POINTER, _POINTER),
}


class Kernel:
    """A kernel of pointers, in the context that the CUDA runtime has made current in this thread.

    `library`: libcuda. `ptx`: its source with the entry `name`. Raises EngineError when the driver does not take it.
    """

    def __init__(self, library: Any, ptx: str, name: str) -> None:
        self._functions = {function: getattr(library, function) for function in _FUNCTIONS}
        for function, types in _FUNCTIONS.items():
            self._functions[function].argtypes = types
        module, entry = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ptx.encode())
        self._module = module
        self._call("cuModuleGetFunction", ctypes.byref(entry), module, name.encode())
        self._entry = entry

    def launch(self, stream: int, blocks: int, threads: int, *addresses: int) -> None:
        """Put a launch with the pointers that the kernel takes on a stream."""
        values = [ctypes.c_void_p(address) for address in addresses]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        self._call("cuLaunchKernel", self._entry, blocks, 1, 1, threads, 1, 1, 0, stream, pointers, None)

    def close(self) -> None:
        """Unload it. It must not run any more."""
        self._call("cuModuleUnload", self._module)

    def _call(self, function: str, *arguments: Any) -> None:
        error = self._functions[function](*arguments)
        if error:
            raise EngineError(f"{function} failed: CUDA error {error}.", hint="See: edgeprune doctor")
