"""Calls to CUDA: their arguments, and what an error says, with NVIDIA's own bindings and without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeprune.errors import EngineError
from edgeprune.runtime.backends.tensorrt.bindings import CudaDriver, identity


class Recorded:
    """A runtime module that notes every call and answers as `cuda.bindings.runtime` does: the error first."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out", cudaMemcpyDeviceToDevice="on")
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=8, cudaDevAttrComputeCapabilityMinor=7)

    def __init__(self, failing: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._failing = failing

    def __getattr__(self, name: str) -> Any:
        results = {"cudaStreamCreate": (5,), "cudaMalloc": (4096,), "cudaGetErrorName": (b"cudaErrorMemoryAllocation",)}

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            return (2 if name == self._failing else 0, *results.get(name, ()))

        call.__name__ = name
        return call

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        return (0 if device == 0 else 1), attribute


def test_every_call_is_made_on_one_stream() -> None:
    cuda = Recorded()
    driver = CudaDriver(cuda)
    array = np.arange(6, dtype=np.float16)
    assert driver.allocate(512) == 4096 and driver.stream == 5
    driver.upload(4096, array)
    driver.copy(8192, 4096, 12)
    driver.download(array, 8192)
    driver.free(4096)
    driver.close()
    assert cuda.calls == [
        ("cudaStreamCreate",),
        ("cudaMalloc", 512),
        ("cudaMemcpyAsync", 4096, array.ctypes.data, 12, "in", 5),
        ("cudaMemcpyAsync", 8192, 4096, 12, "on", 5),
        ("cudaMemcpyAsync", array.ctypes.data, 8192, 12, "out", 5),
        ("cudaStreamSynchronize", 5),
        ("cudaFree", 4096),
        ("cudaStreamSynchronize", 5),
        ("cudaStreamDestroy", 5),
    ]


def test_what_went_wrong_is_named() -> None:
    driver = CudaDriver(Recorded("cudaMalloc"))
    with pytest.raises(EngineError, match=r"cudaMalloc failed: cudaErrorMemoryAllocation\. Close other programs"):
        driver.allocate(1 << 40)


def test_the_gpu_is_what_engines_fit() -> None:
    found = identity(SimpleNamespace(__version__="10.3.0"), Recorded())
    assert (found.tensorrt, found.capability) == ("10.3.0", "8.7")


def test_nvidias_bindings_answer_as_expected() -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime", reason='pip install "edgeprune[tensorrt]"')
    error, name = cuda.cudaGetErrorName(cuda.cudaError_t.cudaErrorMemoryAllocation)
    assert (int(error), name) == (0, b"cudaErrorMemoryAllocation")
    error, count = cuda.cudaGetDeviceCount()
    if int(error) == 0 and count:
        pytest.skip("there is a GPU here: see `pytest -m device`")
    with pytest.raises(EngineError, match=r"cudaStreamCreate failed: cudaError\w+\. See: edgeprune doctor"):
        CudaDriver(cuda)
    with pytest.raises(EngineError, match="CUDA finds no GPU"):
        identity(SimpleNamespace(__version__="10.3.0"), cuda)
