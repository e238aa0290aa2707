"""Decode steps in place: a step of one token is one launch of a CUDA graph.

A step reads the text caches of its conversation at a capacity, a multiple of CAPACITY rows, and all visual tokens of its image.
The engine is told how many rows are real (`edgeprune.bundle.graph_io.ROWS`): a share of the visual tokens (DyRate, PLPHP) is a
number, too. One kernel writes the step's own rows behind the last real ones. So nothing that TensorRT is told changes from step to
step, and what a step puts on the stream is captured once for each capacity: embedding and numbers of the token to the device,
decoder, kernel, logits back. The first two steps on the same caches run by hand, because TensorRT prepares itself for new shapes
then, and what is used once needs no capture: the visual tokens of several images are joined anew for every share of them.

Where a capture fails, steps go on by hand, on the same addresses. Without the driver's compiler for the kernel rows are copied.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from edgeprune.bundle import DECODER, Bundle
from edgeprune.bundle.graph_io import (
    GROUPS,
    ROWS,
    cache_name,
    cache_slots,
    kept_names,
    length_slots,
    rows_name,
    visual_cache_name,
)
from edgeprune.errors import EngineError
from edgeprune.runtime.backends.interface import DecoderOutput
from edgeprune.runtime.backends.kv_cache import GENERATED, DecoderInput, KvArrays, KvCache, can_step
from edgeprune.runtime.backends.tensorrt.arrays import DeviceArray, MemoryPool, Scratch, empty
from edgeprune.runtime.backends.tensorrt.executor import Executor
from edgeprune.runtime.backends.tensorrt.profiles import STEP, TEXT, capacity_for

GRAPH, BY_HAND = "graph", "by hand"  # how a step was launched
_PLACES = 32  # captured: conversations that take turns, times the capacities that each goes through
_THREADS = 128
_ALIGNED = 256  # bytes; TensorRT wants the parts of what a step is told to begin at multiples
_ENTRY = "append_rows"
# One block for each cache, whose entry in the table is: address of the new row, address of the cache, 4-byte words of a row.
APPEND_ROWS = """
.version 7.0
.target sm_80
.address_size 64

.visible .entry append_rows(.param .u64 table, .param .u64 rows)
{
    .reg .pred %done;
    .reg .b32 %index, %word;
    .reg .b64 %table, %rows, %row, %from, %to, %words, %at, %step, %bytes, %source, %target;

    ld.param.u64 %table, [table];
    ld.param.u64 %rows, [rows];
    cvta.to.global.u64 %table, %table;
    cvta.to.global.u64 %rows, %rows;
    mov.u32 %index, %ctaid.x;
    mul.wide.u32 %at, %index, 24;
    add.s64 %table, %table, %at;
    ld.global.u64 %from, [%table];
    ld.global.u64 %to, [%table+8];
    ld.global.u64 %words, [%table+16];
    ld.global.u64 %row, [%rows];
    mul.lo.s64 %bytes, %row, %words;
    shl.b64 %bytes, %bytes, 2;
    add.s64 %to, %to, %bytes;
    mov.u32 %index, %tid.x;
    cvt.u64.u32 %at, %index;
    mov.u32 %index, %ntid.x;
    cvt.u64.u32 %step, %index;
next:
    setp.ge.u64 %done, %at, %words;
    @%done bra end;
    shl.b64 %bytes, %at, 2;
    add.s64 %source, %from, %bytes;
    add.s64 %target, %to, %bytes;
    ld.global.b32 %word, [%source];
    st.global.b32 [%target], %word;
    add.s64 %at, %at, %step;
    bra next;
end:
    ret;
}
"""


@dataclass
class _Place:
    # The caches that steps read and write, by address. `table` [1, caches, 3]: that of the kernel. `used`: whether a step has run.
    # `graph`: executable, 0 before its capture.
    table: DeviceArray
    used: bool = False
    graph: int = 0


class StepsInPlace:
    """The decode steps of all conversations on one device. `failure`: why steps are not captured, "" if they are."""

    def __init__(self, bundle: Bundle, decoder: Executor, pool: MemoryPool, scratch: Scratch) -> None:
        shape, plan, graph = bundle.manifest.decoder, bundle.plan, bundle.manifest.graphs[DECODER]
        self._decoder, self._pool, self._scratch = decoder, pool, scratch
        self._driver, self._plan, self._worked_in = pool.driver, plan, scratch.address
        self._slots = cache_slots(plan, shape.local_layers)
        self._lengths = length_slots(graph.inputs, self._slots)
        self._longest = decoder.longest(cache_name(*self._slots[0]), TEXT)
        widest = max(math.prod(map(int, graph.inputs[cache_name(*slot)].shape[1:])) for slot in self._slots)
        self._nothing = _zeros(pool, (max(widest, 1), 8), np.uint8).lease
        # What a step is told, here and on the device: the token's embedding and positions, and how many rows of the caches are real
        told = {"suffix_embeds": (1, 1, shape.width), "suffix_positions": (shape.position_axes, 1), ROWS: (1 + len(self._lengths),)}
        types = {name: decoder.type(name) for name in told}
        sizes = [math.prod(told[name]) * types[name].itemsize for name in told]
        starts = [0, *itertools.accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]
        self._host = self._driver.pinned(starts[-1])
        self._device = empty(pool, self._host.shape, self._host.dtype)
        placed = list(zip(told, starts, sizes, strict=False))
        self._told = [self._host[start : start + size].view(types[name]).reshape(told[name]) for name, start, size in placed]
        self._parts = {name: DeviceArray(self._device.lease, told[name], types[name], start) for name, start, _ in placed}
        decoder.bind({**self._fixed(), **self._parts}, STEP)
        self._outputs = decoder.outputs(STEP)
        self._logits = self._driver.pinned(self._outputs["logits"].nbytes)
        self._kept = tuple(
            np.zeros([axis if isinstance(axis, int) else 0 for axis in graph.outputs[name].shape], np.int64)
            for name in kept_names(plan, "layer", "cache")
        )
        self._groups = _zeros(pool, (decoder.longest(GROUPS, STEP), 3), np.float32) if GROUPS in graph.inputs else None
        self._grouped: tuple[Callable[[], Any], int] = (lambda: None), 0
        self._tables = empty(pool, (_PLACES, len(self._slots), 3), np.dtype(np.uint64))
        self._free = [self._tables[index : index + 1] for index in range(_PLACES)]
        self._places: OrderedDict[tuple[int, ...], _Place] = OrderedDict()
        self._bound: _Place | None = None
        self._newest: tuple[Callable[[], Any], Callable[[], Any], int, _Place] | None = None
        self.failure, self._kernel = "", None
        try:
            self._kernel = self._driver.kernel(APPEND_ROWS, _ENTRY)
        except EngineError as error:
            self.failure = error.message

    def can_run(self, tokens: DecoderInput, cache: KvCache) -> bool:
        """Return whether a pass is a step that can be run in place: the caches have room for it."""
        held = cache.buffers[0]
        has_room = isinstance(held, DeviceArray) and len(held) >= capacity_for(cache.length)
        return has_room and isinstance(tokens.suffix.embeds, np.ndarray) and can_step(self._plan, tokens, cache)

    def run(self, tokens: DecoderInput, cache: KvCache) -> DecoderOutput:
        """Run the step of one token. Its rows are in the caches afterwards, behind their last.

        Raises EngineError when the conversation is longer than the engine was built for.
        """
        if cache.length > self._longest:
            self._decoder.check_range(cache_name(*self._slots[0]), (cache.length, *cache.buffers[0].shape[1:]), TEXT)
        place = self._place_of(cache)
        self._tell(tokens, cache)
        launched = GRAPH if place.graph else BY_HAND
        if place.graph:
            self._driver.launch(place.graph)
            self._driver.synchronize()
        else:
            self._run_by_hand(place, cache)
        logits = self._logits.view(self._outputs["logits"].dtype).copy()
        return DecoderOutput(logits, (), self._kept, self._split(), launched=launched)

    def close(self) -> None:
        """Discard the captured graphs and the kernel, and free the pinned memory."""
        self._driver.synchronize()  # which also makes CUDA's context current in this thread
        self._forget()
        if self._kernel is not None:
            self._kernel.close()
        for memory in (self._host, self._logits):
            self._driver.unpin(memory)

    def _fixed(self) -> dict[str, DeviceArray]:
        # Inputs that are the same in all steps: no tokens, and the marker of the first tier, which is read by its length alone.
        others = (GROUPS, ROWS, *(name(*slot) for slot in self._slots for name in (cache_name, visual_cache_name)))
        return {
            name: DeviceArray(self._nothing, self._decoder.shape_in(name, STEP), self._decoder.type(name))
            for name in self._decoder.inputs
            if name not in others
        }

    def _place_of(self, cache: KvCache) -> _Place:
        if self._scratch.address != self._worked_in:  # captured steps work where it was
            self._forget()
            self._worked_in = self._scratch.address
        capacity, whole = capacity_for(cache.length), _all_visual(cache)
        if self._newest is not None:
            text, visual, known, place = self._newest
            if text() is cache.buffers[0] and visual() is whole[0] and known == capacity:
                return place
        held = self._on_device(whole)
        key = (
            capacity,
            *(rows.address for rows in _text(cache)),
            *(number for rows in held for number in (rows.address, len(rows))),
        )
        if key not in self._places:
            if not self._free:
                self._discard(self._places.popitem(last=False)[1])
            self._places[key] = _Place(self._free.pop())
            self._places[key].table[:] = self._entries(cache)
        self._places.move_to_end(key)
        place = self._places[key]
        self._newest = weakref.ref(cache.buffers[0]), weakref.ref(whole[0]), capacity, place
        return place

    def _on_device(self, whole: KvArrays) -> tuple[DeviceArray, ...]:
        # Without an image the visual caches are null rows on the host.
        return tuple(
            rows if isinstance(rows, DeviceArray) else DeviceArray(self._nothing, rows.shape, rows.dtype) for rows in whole
        )

    def _entries(self, cache: KvCache) -> np.ndarray:
        rows = [self._outputs[rows_name(*slot)] for slot in self._slots]
        entries = [(new.address, held.address, new.nbytes // 4) for new, held in zip(rows, _text(cache), strict=True)]
        return np.array([entries], np.uint64)

    def _tell(self, tokens: DecoderInput, cache: KvCache) -> None:
        # Writes the numbers of a step, and the groups of the text if they are not those of the step before and a generated one.
        embeds, positions, rows = self._told
        embeds[:], positions[:], rows[0] = tokens.suffix.embeds, tokens.suffix.positions, cache.length
        rows[1:] = [len(cache.visual[slot]) for slot in self._lengths]
        if self._groups is None:
            return
        text, length = self._grouped
        if text() is not cache.buffers[0] or length + 1 != cache.length:
            groups = np.zeros(self._groups.shape, np.float32)
            groups[:, GENERATED] = 1  # rows that are not real have a group too; nothing attends to them
            groups[: len(tokens.text_groups)] = tokens.text_groups
            self._groups[: len(groups)] = groups
        self._grouped = weakref.ref(cache.buffers[0]), cache.length

    def _run_by_hand(self, place: _Place, cache: KvCache) -> None:
        if self._bound is not place:
            self._bind(place, cache)
        self._enqueue(place, cache)
        self._driver.synchronize()
        if place.used and not self.failure:
            try:
                place.graph = self._driver.capture(partial(self._enqueue, place, cache))
            except EngineError as error:
                self.failure = error.message
        place.used = True

    def _bind(self, place: _Place, cache: KvCache) -> None:
        capacity, self._bound = capacity_for(cache.length), None
        text = {cache_name(*slot): held[:capacity] for slot, held in zip(self._slots, _text(cache), strict=True)}
        whole = self._on_device(_all_visual(cache))
        visual = {visual_cache_name(*slot): held for slot, held in zip(self._slots, whole, strict=True)}
        groups = {} if self._groups is None else {GROUPS: self._groups[:capacity]}
        self._decoder.bind({**text, **visual, **groups}, STEP)
        self._bound = place

    def _enqueue(self, place: _Place, cache: KvCache) -> None:
        # All that a step puts on the stream.
        self._driver.upload(self._device.address, self._host)
        self._decoder.enqueue(STEP)
        if self._kernel is None:
            for slot, held in zip(self._slots, _text(cache), strict=True):
                held[cache.length : cache.length + 1] = self._outputs[rows_name(*slot)]
        else:
            addresses = place.table.address, self._parts[ROWS].address
            self._kernel.launch(self._driver.stream, len(self._slots), _THREADS, *addresses)
        self._driver.download_pinned(self._logits, self._outputs["logits"].address)

    def _split(self) -> np.ndarray | None:
        # Of its own, because steps of another conversation write the next one.
        if not self._plan.has_rate_predictor:
            return None
        split = self._outputs["attention_split"]
        own = empty(self._pool, split.shape, split.dtype)
        own[: len(own)] = split
        return cast("np.ndarray", own)

    def _forget(self) -> None:
        for place in self._places.values():
            self._discard(place)
        self._places.clear()
        self._newest = self._bound = None

    def _discard(self, place: _Place) -> None:
        if place.graph:
            self._driver.discard(place.graph)
        if self._bound is place:
            self._bound = None
        self._free.append(place.table)


def _zeros(pool: MemoryPool, shape: tuple[int, ...], kind: type[np.generic]) -> DeviceArray:
    array = empty(pool, shape, np.dtype(kind))
    pool.driver.zero(array.address, array.nbytes)
    return array


def _text(cache: KvCache) -> tuple[DeviceArray, ...]:
    return cast("tuple[DeviceArray, ...]", cache.buffers)


def _all_visual(cache: KvCache) -> KvArrays:
    # What a share of the visual tokens is a part of. Of several images it is joined anew.
    return cache.images[0] if len(cache.images) == 1 else cache.visual
