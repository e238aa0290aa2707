"""TensorRT and CUDA of this machine, or what to do where they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from edgeprune.device.doctor import OLDEST_TENSORRT, diagnose
from edgeprune.device.machine import Machine, read_machine
from edgeprune.errors import EngineError
from edgeprune.runtime.tensorrt.store import Identity


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


def identity(trt: Any, runtime: Any) -> Identity:
    """Return what engines of this machine fit; `runtime` is the module that `cuda` returns."""
    name = runtime.cudaDeviceAttr
    numbers = []
    for attribute in (name.cudaDevAttrComputeCapabilityMajor, name.cudaDevAttrComputeCapabilityMinor):
        error, value = runtime.cudaDeviceGetAttribute(attribute, 0)
        if int(error):
            raise EngineError(f"CUDA finds no GPU ({error}).", hint="See: edgeprune doctor")
        numbers.append(str(value))
    return Identity(str(trt.__version__), ".".join(numbers))


def _missing(machine: Machine, error: ImportError) -> str:
    # The doctor's own words: what blocks the build on this machine, and the command.
    blocked = next((each for each in diagnose(machine).abilities if each.name == "build TensorRT engines" and not each.able), None)
    if blocked is None:
        return f"{error}. See: edgeprune doctor"
    return f"{blocked.reason}." + (f" Remedy: {blocked.remedy}" if blocked.remedy else "")
