"""One buffer of keys and one of values for each layer, which steps of one token read and extend in place.

A step reads cached visual tokens and text from two places of a `KvCache`, in the layout of prefill. Here they lie one behind the
other, visual tokens first, head by head [1, kv heads, capacity, head_dim]: one product a head reads them, a step adds its row
behind the last, and the addresses stay. The cache stays complete, so whatever else reads or continues a conversation needs no
buffer. Nothing here belongs to an engine.

In 8 bits a buffer has a scale for each channel, found from the rows of the conversation itself: the outliers of keys are those of
channels (KIVI, Liu et al., arXiv 2402.02750). The cache keeps its own type, so rows can be quantized again when one does not fit.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np

from edgeprune.runtime.backends.kv_cache import CAPACITY, KvArrays, KvBlock, KvCache

T = TypeVar("T")
Room = Callable[[int, KvCache], KvBlock]
_CONVERSATIONS = 8  # that keep their buffers: more than answers at a time
_STEPS = 127  # of an 8-bit number, to each side
_ROOM = 2.0  # for rows to come, over the largest number of a channel: answers reach further than prompts
_CUT_OFF = 0.05  # share of a row's length that may lie beyond the scales; among thousands of channels some number always does


class StepBuffers:
    """The packed keys and values of one conversation.

    `arrays`: key and value of each layer in turn, as in `KvCache.buffers`. `lengths` [layers], int32: their valid rows.
    `scales`: with `quantized` what one step of each channel is [kv heads * head_dim], for each of `arrays`.
    """

    def __init__(self, layers: int, *, quantized: bool = False) -> None:
        self.arrays = KvBlock()
        self.scales: KvArrays = ()
        self._quantized = quantized
        self.lengths = np.zeros(layers, np.int32)
        self._text: Callable[[], np.ndarray | None] = lambda: None
        self._visual: KvArrays = ()
        self._length = 1  # packed text rows of the cache, with its null row
        self._stepped = False

    def follow(self, cache: KvCache, room: Room | None = None) -> None:
        """Hold what a decode step on `cache` reads. `arrays` are others afterwards if another capacity is needed.

        `room(capacity, cache)` returns arrays of so many rows or more; None for new ones of exactly as many.
        """
        room = room or self._own_room  # not kept: a cycle, so the arrays would stay until a collection
        if not self._continues(cache):
            self._pack(cache, room)
        if not self._has_newest(cache):
            self._copy_text(cache, room)
        self.lengths += np.int32(cache.length - self._length)
        self._text, self._visual = weakref.ref(cache.buffers[0]), cache.visual
        self._length, self._stepped = cache.length, False

    def stepped(self) -> None:
        """Note that a step wrote its row behind the last of each layer, where the cache will have it too."""
        self._stepped = True

    def disturbed(self) -> None:
        """Note that something else was written behind the last row of each layer."""
        self._stepped = False

    def _continues(self, cache: KvCache) -> bool:
        if cache.buffers[0] is not self._text() or cache.length < self._length:
            return False
        return cache.visual is self._visual or all(map(_same, cache.visual, self._visual))

    def _has_newest(self, cache: KvCache) -> bool:
        # Whether the cache has grown by the row that the last step wrote. The last values tell any two tokens apart.
        if not self._stepped or cache.length != self._length + 1:
            return False
        stored, row = self.arrays[-1][0, :, self.lengths[-1]], self._stored(-1, cache.buffers[-1][self._length])
        if self._quantized:  # an engine may round a tie to the other side
            return bool((np.abs(stored - row) <= 1).all())
        return np.array_equal(stored, row)

    def fits(self, rows: np.ndarray) -> bool:
        """Return whether the rows that a step added [arrays, kv heads * head_dim] lie within the scales."""
        return _within(rows, np.stack(self.scales))

    def forget(self) -> None:
        """Hold nothing, so that the next step begins with new rows and scales."""
        self._text = lambda: None
        self.lengths[:] = 0

    def _pack(self, cache: KvCache, room: Room) -> None:
        # The visual rows; no text is packed afterwards.
        rows = [len(visual) - 1 for visual in cache.visual]
        # The text buffers have room for the whole answer. Memory that is never written takes no room.
        capacity = -(-(max(rows) + len(cache.buffers[0])) // CAPACITY) * CAPACITY
        self._text, self._stepped = lambda: None, False  # nothing is valid if memory runs out
        self.arrays = room(capacity, cache)
        self.scales = self.scales or tuple(np.zeros(text[0].size, np.float32) for text in cache.buffers if self._quantized)
        for scale, visual, text in zip(self.scales, cache.visual, cache.buffers, strict=False):
            peaks = np.maximum(*(np.abs(rows).max(axis=0, initial=1e-6) for rows in (visual[1:], text[1 : cache.length])))
            # A channel has at least what is usual in its head: the quiet ones of a prompt need not be quiet in the answer.
            usual = np.sqrt((peaks**2).mean(axis=-1, keepdims=True))
            scale[:] = np.maximum(peaks, usual).ravel() * (_ROOM / _STEPS)
        for index, (array, visual) in enumerate(zip(self.arrays, cache.visual, strict=True)):
            array[0, :, : len(visual) - 1] = self._stored(index, visual[1:]).swapaxes(0, 1)
        self.lengths[:], self._length = rows[::2], 1

    def _own_room(self, capacity: int, cache: KvCache) -> KvBlock:
        if self.arrays and self.arrays[0].shape[2] == capacity:
            return self.arrays
        return new_arrays(1, capacity, cache, np.dtype(np.int8) if self._quantized else None)

    def _copy_text(self, cache: KvCache, room: Room) -> None:
        new = slice(self._length, cache.length)
        texts = zip(cache.buffers, self.scales, strict=False)
        if not all(_within(text[new].reshape(-1, len(scale)), scale) for text, scale in texts):
            self._pack(cache, room)
        for index, (text, place) in enumerate(zip(cache.buffers, np.repeat(self.lengths, 2), strict=True)):
            rows = self._stored(index, text[self._length : cache.length])
            self.arrays[index][0, :, place : place + len(rows)] = rows.swapaxes(0, 1)

    def _stored(self, index: int, rows: np.ndarray) -> np.ndarray:
        # Rows [..., kv heads, head_dim] as one of `arrays` holds them.
        if not self._quantized:
            return rows
        steps = rows / self.scales[index].reshape(rows.shape[-2:])
        return np.clip(np.rint(steps, out=steps), -_STEPS, _STEPS, out=steps)


def new_arrays(conversations: int, capacity: int, cache: KvCache, kind: np.dtype[Any] | None = None) -> KvBlock:
    """Return buffers [conversations, kv heads, capacity, head_dim] like those of a cache, of its type or of another `kind`."""
    _, heads, width = cache.buffers[0].shape
    shape = (len(cache.buffers), conversations, heads, capacity, width)
    return KvBlock.of(np.zeros(shape, kind or cache.buffers[0].dtype))


def _within(rows: np.ndarray, scales: np.ndarray) -> bool:
    beyond = np.maximum(np.abs(rows) - _STEPS * scales, 0)
    return bool(((beyond**2).sum(axis=-1) <= _CUT_OFF**2 * (rows**2).sum(axis=-1)).all())


def _same(array: np.ndarray, other: np.ndarray) -> bool:
    return array is other or (array.shape == other.shape and array.ctypes.data == other.ctypes.data)


class Recent(Generic[T]):
    """What the conversations of the last steps have each of their own; `make` makes it. It goes when its conversation goes."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._known: OrderedDict[int, tuple[Callable[[], np.ndarray | None], T]] = OrderedDict()

    def of(self, cache: KvCache) -> T:
        """Return what belongs to the conversation of a cache."""
        text = cache.buffers[0]
        key = id(text)
        known = self._known.pop(key, None)
        if known is None or known[0]() is not text:
            known = weakref.ref(text, lambda _: self._forget(key)), self._make()
        self._known[key] = known
        if len(self._known) > _CONVERSATIONS:
            self._known.popitem(last=False)
        return known[1]

    def _forget(self, key: int) -> None:
        known = self._known.get(key)
        if known is not None and known[0]() is None:  # another array may have the number by now
            self._known.pop(key, None)
