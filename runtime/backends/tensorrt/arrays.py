"""Device arrays that the generation loop uses like NumPy arrays, the memory pool behind them, and the scratch memory of engines.

The loop only reads shapes, slices prefixes, concatenates and writes rows. It never reads values. Each array holds a lease on a
block of the pool. The block returns to the pool when its last array is garbage-collected.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.errors import EngineError
from edgeprune.runtime.backends.tensorrt.bindings import Driver

_ALIGNMENT = 256  # bytes; TensorRT requires it of tensor addresses


class MemoryPool:
    """A pool of reusable device memory blocks. A block keeps the size of its first lease."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._free: dict[int, list[int]] = {}
        self._all: dict[int, int] = {}

    def lease(self, size: int) -> Lease:
        """Return a block of at least `size` bytes, a free block of the same rounded size if there is one."""
        size = max(-(-size // _ALIGNMENT), 1) * _ALIGNMENT
        free = self._free.setdefault(size, [])
        # The lowest: caches of the next conversation then lie where those of the last one did, and captured steps know addresses.
        address = heapq.heappop(free) if free else self.driver.allocate(size)
        self._all[address] = size
        return Lease(self, address)

    def give_back(self, address: int) -> None:
        """Return a block to the pool. Stream order ensures that pending work on it finishes before it is used again."""
        if address in self._all:
            heapq.heappush(self._free[self._all[address]], address)

    @property
    def bytes(self) -> int:
        """Bytes that the pool has allocated, leased or free."""
        return sum(self._all.values())

    def close(self) -> None:
        """Free every block. Remaining arrays become invalid."""
        for address in self._all:
            self.driver.free(address)
        self._all, self._free = {}, {}


class Lease:
    """A block of the pool, returned when the lease is garbage-collected."""

    def __init__(self, pool: MemoryPool, address: int) -> None:
        self.pool, self.address = pool, address

    def __del__(self) -> None:
        self.pool.give_back(self.address)


class Scratch:
    """The scratch memory of all execution contexts: one block, because they run one after another on one stream.

    `address`: where it is. `bytes`: its size, which is the largest that a context needs.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver, self._contexts = driver, list[Any]()
        self.address = self.bytes = 0

    def serve(self, context: Any, size: int) -> None:
        """Let a context work in the block, which grows to `size` bytes if that is more.

        Raises EngineError when there is no memory for it; the other contexts then have a block as before.
        """
        if size > self.bytes:
            self._grow(size)
        self._contexts.append(context)
        context.set_device_memory(self.address, self.bytes)

    def close(self) -> None:
        """Free the block. Its contexts must not run any more."""
        self._contexts.clear()
        self._free()

    def _grow(self, size: int) -> None:
        before = self.bytes
        self._driver.synchronize()  # what runs still works in the old block
        self._free()  # first, because both together may not fit
        try:
            self._allocate(size)
        except EngineError:
            self._allocate(before)
            raise
        finally:
            for context in self._contexts:
                context.set_device_memory(self.address, self.bytes)

    def _allocate(self, size: int) -> None:
        if size:
            self.address, self.bytes = self._driver.allocate(size), size

    def _free(self) -> None:
        if self.bytes:
            self._driver.free(self.address)
        self.address = self.bytes = 0


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A contiguous array on the device. `offset`: bytes from the start of its block."""

    lease: Lease
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int = 0

    @property
    def address(self) -> int:
        """The device address of the first element."""
        return self.lease.address + self.offset

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> DeviceArray:
        """Return a view of consecutive rows."""
        start, stop, step = rows.indices(len(self))
        assert step == 1
        row = self.nbytes // len(self) if len(self) else 0
        return DeviceArray(self.lease, (max(stop - start, 0), *self.shape[1:]), self.dtype, self.offset + start * row)

    def __setitem__(self, rows: slice, value: DeviceArray | np.ndarray) -> None:
        """Write consecutive rows."""
        target = self[rows]
        assert target.shape == value.shape and target.dtype == value.dtype
        if isinstance(value, DeviceArray):
            self.lease.pool.driver.copy(target.address, value.address, value.nbytes)
        else:
            self.lease.pool.driver.upload(target.address, np.ascontiguousarray(value))

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        """Implement np.concatenate and np.empty_like on the device (NumPy's NEP 18). Other functions are not implemented."""
        del types
        pool = self.lease.pool
        if function is np.concatenate:
            return joined(pool, arguments[0], **options)
        if function is np.empty_like:
            array = empty(pool, options["shape"], self.dtype)
            pool.driver.zero(array.address, array.nbytes)  # steps read rows that nobody wrote, behind a mask: 0 x NaN is NaN
            return array
        return NotImplemented

    def numpy(self) -> np.ndarray:
        """Return a host copy. Blocks until the copy is complete."""
        array = np.empty(self.shape, self.dtype)
        if array.nbytes:
            self.lease.pool.driver.download(array, self.address)
        return array


def empty(pool: MemoryPool, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
    """Return an uninitialized array on the device."""
    return DeviceArray(pool.lease(math.prod(shape) * dtype.itemsize), shape, dtype)


def upload(pool: MemoryPool, array: np.ndarray) -> DeviceArray:
    """Copy a host array to the device and return it."""
    array = np.ascontiguousarray(array)
    lease = pool.lease(array.nbytes)
    if array.nbytes:
        pool.driver.upload(lease.address, array)
    return DeviceArray(lease, array.shape, array.dtype)


def joined(pool: MemoryPool, arrays: Sequence[DeviceArray | np.ndarray], axis: int = 0) -> DeviceArray:
    """Concatenate arrays along an axis. All axes before it must have length 1. Host arrays are uploaded first."""
    parts = [part if isinstance(part, DeviceArray) else upload(pool, part) for part in arrays]
    first = parts[0]
    assert all(length == 1 for length in first.shape[:axis])
    lease = pool.lease(sum(part.nbytes for part in parts))
    end = lease.address
    for part in parts:
        if part.nbytes:
            pool.driver.copy(end, part.address, part.nbytes)
        end += part.nbytes
    length = sum(part.shape[axis] for part in parts)
    return DeviceArray(lease, (*first.shape[:axis], length, *first.shape[axis + 1 :]), first.dtype)
