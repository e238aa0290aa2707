"""Calls to CUDA through the driver: their arguments, and what an error says."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from device_simulation import STREAM, SimulatedCudart, SimulatedDriver

from edgeprune.device.cudart import Cudart, load_cudart
from edgeprune.errors import EngineError
from edgeprune.runtime.backends.tensorrt.arrays import MemoryPool, upload
from edgeprune.runtime.backends.tensorrt.bindings import Driver, identity
from edgeprune.runtime.backends.tensorrt.steps import APPEND_ROWS


def test_every_call_is_made_on_one_stream() -> None:
    library = SimulatedCudart()
    driver = SimulatedDriver(library)
    array, back = np.arange(6, dtype=np.float16), np.zeros(6, np.float16)
    first, second = driver.allocate(512), driver.allocate(256)
    driver.upload(first, array)
    driver.copy(second, first, 12)
    driver.download(back, second)
    assert driver.stream == STREAM and np.array_equal(back, array)
    driver.free(first)
    driver.free(second)
    driver.close()
    assert driver.closed and library.calls == [
        ("allocate", 512),
        ("allocate", 256),
        ("upload", 12),
        ("copy", 12),
        ("download", 12),
        ("synchronize",),
        ("free", first),
        ("free", second),
        ("synchronize",),
    ]


def test_what_went_wrong_is_named() -> None:
    driver = SimulatedDriver(SimulatedCudart(failing={"cudaMalloc": 2}))
    with pytest.raises(EngineError, match=r"cudaMalloc failed: cudaErrorMemoryAllocation \(2\)\. Close other programs"):
        driver.allocate(1 << 40)


def test_the_gpu_is_what_engines_fit() -> None:
    trt = SimpleNamespace(__version__="10.3.0")
    found = identity(trt, Cudart(SimulatedCudart(), "libcudart.so.12", (12, 6)))
    assert (found.tensorrt, found.capability, found.sms) == ("10.3.0", "8.7", 8)
    none = SimulatedCudart(failing={"cudaDeviceGetAttribute": 100})
    with pytest.raises(EngineError, match=r"cudaDeviceGetAttribute failed: cudaErrorNoDevice \(100\)\. See: edgeprune doctor"):
        identity(trt, Cudart(none, "libcudart.so.12", (12, 6)))


def test_a_stream_on_a_driver_that_is_too_old_names_both_versions() -> None:
    with pytest.raises(EngineError, match=r"cudaStreamCreate failed: cudaErrorInsufficientDriver \(35\).* 12\.9 .* CUDA 12\.6\."):
        SimulatedDriver(SimulatedCudart((12, 9), (12, 6)))


@pytest.fixture
def gpu() -> Iterator[Driver]:
    try:
        driver = Driver(load_cudart())
    except EngineError as error:
        pytest.skip(f"needs a GPU: {error}")
    yield driver
    driver.close()


def comes_back(driver: Driver, count: int) -> bool:
    array, back = np.arange(count, dtype=np.float32), np.zeros(count, np.float32)
    first, second = driver.allocate(array.nbytes), driver.allocate(array.nbytes)
    driver.upload(first, array)
    driver.copy(second, first, array.nbytes)
    driver.download(back, second)
    for address in (first, second):
        driver.free(address)
    return np.array_equal(back, array)


@pytest.mark.device
@pytest.mark.parametrize("count", [1, 1000, 1 << 20])
def test_memory_of_a_gpu_holds_what_it_is_given(gpu: Driver, count: int) -> None:
    assert comes_back(gpu, count)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(comes_back, gpu, count).result()


@pytest.mark.device
def test_a_gpu_goes_on_after_an_error(gpu: Driver) -> None:
    with pytest.raises(EngineError, match="cudaErrorMemoryAllocation"):
        gpu.allocate(1 << 45)
    assert comes_back(gpu, 1000)
    with pytest.raises(EngineError, match="cudaErrorInvalidValue"):
        gpu.copy(8, 16, 4)
    assert comes_back(gpu, 1000)


def captured_rows_are_appended(driver: Driver) -> bool:
    """Write rows of two caches by the captured kernel, at a place that each launch is told; return whether they are there alone."""
    pool, draws = MemoryPool(driver), np.random.default_rng(2)
    rows = [draws.integers(0, 1 << 16, (1, width), dtype=np.uint16) for width in (2, 512)]
    caches: list[Any] = [np.empty_like(upload(pool, new), shape=(8, new.shape[1])) for new in rows]
    sources: list[Any] = [upload(pool, new) for new in rows]
    entries = [(new.address, held.address, new.nbytes // 4) for new, held in zip(sources, caches, strict=True)]
    table, place = upload(pool, np.array(entries, np.uint64)), upload(pool, np.zeros(1, np.int64))
    told, back, kernel = driver.pinned(8), driver.pinned(rows[1].nbytes), driver.kernel(APPEND_ROWS, "append_rows")

    def enqueue() -> None:
        driver.upload(place.address, told)
        kernel.launch(driver.stream, len(rows), 128, table.address, place.address)
        driver.download_pinned(back, caches[1][5:6].address)

    enqueue()  # at 0
    driver.synchronize()
    graph = driver.capture(enqueue)
    for row in (3, 5):
        told.view(np.int64)[0] = row
        driver.launch(graph)
        driver.synchronize()
    right = np.array_equal(back.view(np.uint16), rows[1][0])
    for held, new in zip(caches, rows, strict=True):
        expected = np.zeros(held.shape, np.uint16)
        expected[[0, 3, 5]] = new
        right &= np.array_equal(held.numpy(), expected)
    with pytest.raises(EngineError, match="cudaErrorStreamCapture"):
        driver.capture(lambda: driver.zero(driver.allocate(256), 256))
    driver.discard(graph)
    kernel.close()
    pool.close()
    for memory in (told, back):
        driver.unpin(memory)
    return bool(right)


def test_rows_are_appended_by_what_the_ptx_says() -> None:
    library = SimulatedCudart()
    library.interpreting = True
    driver = SimulatedDriver(library)
    assert captured_rows_are_appended(driver)
    driver.close()
    assert driver.closed


@pytest.mark.device
def test_a_gpu_appends_rows_in_a_captured_graph(gpu: Driver) -> None:
    assert captured_rows_are_appended(gpu) and comes_back(gpu, 1000)


@pytest.mark.device
def test_arrays_of_a_gpu_are_joined_there(gpu: Driver) -> None:
    pool, draws = MemoryPool(gpu), np.random.default_rng(1)
    first, second = (draws.standard_normal((rows, 2, 8)).astype(np.float16) for rows in (5, 3))
    joined: Any = np.concatenate([upload(pool, first), upload(pool, second)])
    expected = np.concatenate([first, second])
    assert np.array_equal(joined.numpy(), expected) and np.array_equal(joined[2:6].numpy(), expected[2:6])
    del joined
    pool.close()
