"""Buffers for decode steps hold what a step on the cache reads, whatever happens to the conversation between them."""

from __future__ import annotations

import gc

import numpy as np

from edgeprune.bundle import DecoderShape
from edgeprune.plan import Geometry, KeepPlan
from edgeprune.runtime.backends.kv_cache import CAPACITY, KvArrays, KvBlock, KvCache
from edgeprune.runtime.backends.step_buffers import Recent, StepBuffers

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


def test_rows_in_one_block_are_those_of_all_layers() -> None:
    cache, row = cache_of(5, visual=12), some(1)
    assert isinstance(cache.buffers, KvBlock)
    other, block = cache.copy_prefix(cache.length).append(row, 0, 1), KvBlock.of(np.stack(row))
    cache = cache.append(block, 0, 1)
    for expected, actual in zip(other.text, cache.text, strict=True):
        np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(cache.text[3][-1], row[3][0])
    for large in (cache.append(block, 1, 0), cache.append(KvBlock.of(np.stack(some(CAPACITY))), 0, CAPACITY)):
        assert large.length > cache.length
        np.testing.assert_array_equal(large.text[3][: cache.length], cache.text[3])


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


def restored(buffers: StepBuffers, number: int) -> np.ndarray:
    """Return the valid rows of an 8-bit buffer as floats [rows, kv heads, head_dim]."""
    length = int(buffers.lengths[number // 2])
    whole: np.ndarray = buffers.arrays[number][0, :, :length].swapaxes(0, 1) * buffers.scales[number].reshape(2, 8)
    return whole


def check_restored(buffers: StepBuffers, cache: KvCache) -> None:
    for number, (text, visual) in enumerate(zip(cache.text, cache.visual, strict=True)):
        expected = np.concatenate([visual[1:], text[1:]])
        half_a_step = 0.5001 * buffers.scales[number].reshape(2, 8)
        assert (np.abs(restored(buffers, number) - expected) <= half_a_step).all()


def test_8_bits_hold_each_channel_to_half_a_step() -> None:
    buffers, cache = StepBuffers(3, quantized=True), cache_of(5, visual=12)
    for array in (*cache.text, *cache.visual):
        array[:, 1, 3] *= 50.0  # a channel of outliers costs the others nothing
    buffers.follow(cache)
    assert buffers.arrays[0].dtype == np.int8
    assert buffers.scales[0].reshape(2, 8)[0].max() < 0.1 < buffers.scales[0].reshape(2, 8)[1, 3]
    check_restored(buffers, cache)
    arrays, scales = buffers.arrays, [scale.copy() for scale in buffers.scales]
    cache = cache.append(some(2), 0, 2)
    buffers.follow(cache)
    check_restored(buffers, cache)
    assert buffers.arrays is arrays and all(map(np.array_equal, buffers.scales, scales))


def test_rows_beyond_the_scales_get_others() -> None:
    buffers, cache = StepBuffers(3, quantized=True), cache_of(5, visual=12)
    buffers.follow(cache)
    memory = [scale.ctypes.data for scale in buffers.scales]
    large = tuple(10 * row for row in some(1))
    rows = np.stack([row.ravel() for row in large])
    assert buffers.fits(rows / 10) and not buffers.fits(rows)
    grown = cache.append(large, 0, 1)
    buffers.follow(grown)  # a turn brings them
    check_restored(buffers, grown)
    assert [scale.ctypes.data for scale in buffers.scales] == memory  # what is bound stays
    buffers.forget()  # a step brought them
    buffers.follow(grown)
    check_restored(buffers, grown)


def test_an_engine_may_round_a_tie_to_the_other_side() -> None:
    buffers, cache = StepBuffers(3, quantized=True), cache_of(5, visual=12)
    buffers.follow(cache)
    row = some(1)
    for number, new in enumerate(row):
        steps = np.rint(new[0] / buffers.scales[number].reshape(2, 8))
        buffers.arrays[number][0, :, 17] = steps + (1 if number == 5 else 0)
    buffers.stepped()
    grown = cache.append(row, 0, 1)
    for text in grown.buffers[:-1]:
        text[grown.length - 1] = 0.0  # which would be seen in a copy
    buffers.follow(grown)
    np.testing.assert_allclose(restored(buffers, 0)[17], row[0][0], atol=buffers.scales[0].max())
