"""Arrays on the device that pass through the generation loop as NumPy's do.

The loop looks at shapes, takes prefixes, joins and writes rows; it never looks inside. Memory is leased from a pool and goes back
when the last array on it is forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.runtime.backends.tensorrt.bindings import Driver

_GRAIN = 256  # bytes: TensorRT wants addresses aligned to it


class MemoryPool:
    """Memory of the device in blocks that are used again; a block has the size that was asked for it first."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._free: dict[int, list[int]] = {}
        self._all: dict[int, int] = {}

    def lease(self, size: int) -> Lease:
        """Return a block of at least `size` bytes; the same sizes find each other's blocks again."""
        size = max(-(-size // _GRAIN), 1) * _GRAIN
        waiting = self._free.setdefault(size, [])
        address = waiting.pop() if waiting else self.driver.allocate(size)
        self._all[address] = size
        return Lease(self, address)

    def give_back(self, address: int) -> None:
        """Take a block back; what the stream still does with it comes before whatever uses it next."""
        if address in self._all:
            self._free[self._all[address]].append(address)

    @property
    def bytes(self) -> int:
        """Memory that the pool holds."""
        return sum(self._all.values())

    def close(self) -> None:
        """Free every block; arrays that are still around may no longer be used."""
        for address in self._all:
            self.driver.free(address)
        self._all, self._free = {}, {}


class Lease:
    """A block, given back when nothing refers to it."""

    def __init__(self, pool: MemoryPool, address: int) -> None:
        self.pool, self.address = pool, address

    def __del__(self) -> None:
        self.pool.give_back(self.address)


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A contiguous array on the device: shape, NumPy type, and where it begins in its block."""

    lease: Lease
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int = 0

    @property
    def address(self) -> int:
        """Where it lies."""
        return self.lease.address + self.offset

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> DeviceArray:
        """Return consecutive rows: a view, nothing is copied."""
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
        """Join and make room on the device where NumPy would (NumPy's protocol of NEP 18); nothing else is done to these arrays."""
        del types
        pool = self.lease.pool
        if function is np.concatenate:
            return joined(pool, arguments[0], **options)
        if function is np.empty_like:
            return empty(pool, options["shape"], self.dtype)
        return NotImplemented

    def numpy(self) -> np.ndarray:
        """Return a copy on the host, waiting for it."""
        array = np.empty(self.shape, self.dtype)
        if array.nbytes:
            self.lease.pool.driver.download(array, self.address)
        return array


def empty(pool: MemoryPool, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
    """Return an array on the device of which nothing is set."""
    return DeviceArray(pool.lease(math.prod(shape) * dtype.itemsize), shape, dtype)


def upload(pool: MemoryPool, array: np.ndarray) -> DeviceArray:
    """Return a copy of a host array on the device."""
    array = np.ascontiguousarray(array)
    lease = pool.lease(array.nbytes)
    if array.nbytes:
        pool.driver.upload(lease.address, array)
    return DeviceArray(lease, array.shape, array.dtype)


def joined(pool: MemoryPool, arrays: Sequence[DeviceArray | np.ndarray], axis: int = 0) -> DeviceArray:
    """Return arrays one after the other along an axis that none but axes of length 1 precede."""
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
