"""The buffers of several conversations in one memory, so that a pass over steps of all of them reads each where it lies.

An engine takes neighbouring slots, so conversations move together: one that would leave a gap is packed again, from its cache,
into a slot that nobody uses. Nothing is copied otherwise. Nothing here belongs to an engine.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from edgeprune.runtime.backends.kv_cache import KvBlock, KvCache
from edgeprune.runtime.backends.step_buffers import StepBuffers, new_arrays

_IDLE = 16  # passes without a step after which another conversation may have the slot


class StepSlots:
    """Slots for `count` conversations.

    `arrays`: key and value of each layer in turn [count, kv heads, capacity, head_dim]. `buffers`: the `StepBuffers` of each slot.
    A conversation has its slot until it ends, or rests while another needs one.
    """

    def __init__(self, count: int, layers: int) -> None:
        self.arrays = KvBlock()
        self.buffers = [StepBuffers(layers) for _ in range(count)]
        self._tenants: list[Callable[[], np.ndarray | None]] = [_nobody] * count  # the text of each conversation
        self._used = [0] * count
        self._passes = 0

    def place(self, caches: Sequence[KvCache]) -> list[int | None]:
        """Return the slots of conversations, which hold what their next steps read; None where all slots are in use."""
        self._passes += 1
        texts = [cache.buffers[0] for cache in caches]
        numbers = [self._slot_of(text) for text in texts]
        for index, text in enumerate(texts):
            if numbers[index] is None:
                numbers[index] = self._take(text, numbers, range(len(self.buffers)))
        self._close_gap(numbers)
        placed = [(number, cache) for number, cache in zip(numbers, caches, strict=True) if number is not None]
        arrays: KvBlock | None = None
        while arrays is not self.arrays:  # whoever needs more room makes all others begin anew
            arrays = self.arrays
            for number, cache in placed:
                self._used[number] = self._passes
                self.buffers[number].follow(cache, partial(self._room, number))
        return numbers

    def _slot_of(self, text: np.ndarray) -> int | None:
        return next((number for number, tenant in enumerate(self._tenants) if tenant() is text), None)

    def _take(self, text: np.ndarray, taken: Sequence[int | None], among: Iterable[int]) -> int | None:
        # Gives a conversation the first slot that nobody uses, if there is one.
        for number in among:
            idle = self._passes - self._used[number] > _IDLE
            if number not in taken and (idle or self._tenants[number]() is None):
                self._tenants[number] = weakref.ref(text)
                self.buffers[number].forget()
                return number
        return None

    def _close_gap(self, numbers: list[int | None]) -> None:
        # Moves the last conversation into the first free slot between them, one in a pass.
        placed = sorted(number for number in numbers if number is not None)
        if len(placed) < 2 or placed[-1] - placed[0] < len(placed):
            return
        text = self._tenants[placed[-1]]()
        assert text is not None
        moved = self._take(text, numbers, range(placed[0], placed[-1]))
        if moved is not None:
            numbers[numbers.index(placed[-1])] = moved
            self._tenants[placed[-1]] = _nobody

    def _room(self, number: int, capacity: int, cache: KvCache) -> KvBlock:
        held = self.arrays[0].shape[2] if self.arrays else 0
        alone = all(tenant() is None for other, tenant in enumerate(self._tenants) if other != number)
        if held < capacity or (alone and held != capacity):
            for buffers in self.buffers:
                buffers.forget()
            self.arrays = new_arrays(len(self.buffers), capacity, cache)
        return KvBlock.of(self.arrays.block[:, number : number + 1])


def _nobody() -> None:
    return None
