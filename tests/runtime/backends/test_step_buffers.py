"""Buffers for decode steps hold what a step on the cache reads, whatever happens to the conversation between them."""

from __future__ import annotations

import gc

import numpy as np

from edgeprune.bundle import DecoderShape
from edgeprune.plan import Geometry, KeepPlan
from edgeprune.runtime.backends.kv_cache import KvArrays, KvCache
from edgeprune.runtime.backends.step_buffers import CAPACITY, Recent, StepBuffers

SHAPE = DecoderShape(layers=3, hidden=48, kv_heads=2, head_dim=8, vocabulary=100, context=64, position_axes=3)
PLAN = KeepPlan("qwen2_vl", 3, Geometry(height=84, width=112, patch=14, merge=2))
draws = np.random.default_rng(0)


def some(count: int) -> KvArrays:
    return tuple(draws.standard_normal((count, 2, 8)).astype(np.float32) for _ in range(6))


def cache_of(text: int, visual: int = 0) -> KvCache:
    """Return a cache of random rows, with room for as much text as its buffers have."""
    empty = KvCache.empty(SHAPE, PLAN)
    return empty.append(some(text + visual), 1, text - 1)


def check(buffers: StepBuffers, cache: KvCache) -> None:
    """Compare what is in the buffers with what a step on the cache reads."""
    assert buffers.arrays[0].shape[2] % CAPACITY == 0
    for number, (array, text, visual) in enumerate(zip(buffers.arrays, cache.text, cache.visual, strict=True)):
        expected = np.concatenate([visual[1:], text[1:]])
        length = int(buffers.lengths[number // 2])
        np.testing.assert_array_equal(array[0, :, :length].swapaxes(0, 1), expected)
        assert array.shape[2] > length  # room for the next row


def test_buffers_hold_what_a_step_reads() -> None:
    buffers, cache = StepBuffers(3), cache_of(5, visual=12)
    for _ in range(2):
        buffers.follow(cache)
        check(buffers, cache)
    arrays, cache = buffers.arrays, cache.limit_visual([1.0, 0.5, 0.0], 0)  # a decode cut
    buffers.follow(cache)
    check(buffers, cache)
    assert buffers.arrays is arrays
    assert buffers.lengths.tolist() == [17, 11, 5]


def test_the_row_of_a_step_is_not_copied_again() -> None:
    buffers, cache = StepBuffers(3), cache_of(5, visual=12)
    buffers.follow(cache)
    row = some(1)
    for array, new in zip(buffers.arrays, row, strict=True):
        array[0, :, 17] = new[0]  # as the graph does
    buffers.stepped()
    grown = cache.append(row, 0, 1)
    for text in grown.buffers[:-1]:
        text[grown.length - 1] = 7.0  # which would be seen in a copy
    buffers.follow(grown)
    np.testing.assert_array_equal(buffers.arrays[0][0, :, 17], row[0][0])
    assert buffers.lengths.tolist() == [18, 18, 18]


def test_a_step_that_came_to_nothing_is_overwritten() -> None:
    buffers, cache = StepBuffers(3), cache_of(5, visual=12)
    buffers.follow(cache)
    for count in (3, 1):
        buffers.stepped()  # its row is in no cache
        cache = cache.append(some(count), 0, count)
        buffers.follow(cache)
        check(buffers, cache)


def test_a_conversation_outgrows_its_buffers() -> None:
    buffers, cache = StepBuffers(3), cache_of(5, visual=12)
    buffers.follow(cache)
    arrays, grown = buffers.arrays, cache.append(some(CAPACITY), 0, CAPACITY)
    buffers.follow(grown)
    assert buffers.arrays is not arrays
    check(buffers, grown)


def test_conversations_have_their_own_until_they_end() -> None:
    made: list[int] = []
    recent = Recent(lambda: made.append(1) or len(made))  # type: ignore[func-returns-value]
    first, second = cache_of(5), cache_of(5)
    assert [recent.of(cache) for cache in (first, second, first, first.append(some(1), 0, 1))] == [1, 2, 1, 1]
    del first, second
    gc.collect()
    assert not recent._known
    others = [cache_of(5) for _ in range(20)]
    assert [recent.of(cache) for cache in others] == list(range(3, 23))
    assert len(recent._known) < len(others)
