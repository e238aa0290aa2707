"""Slots hold what the steps of several conversations read, whoever comes, grows, rests or ends."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from test_step_buffers import cache_of, some

from edgeprune.runtime.backends import step_slots
from edgeprune.runtime.backends.kv_cache import CAPACITY, KvCache
from edgeprune.runtime.backends.step_slots import StepSlots


def check(slots: StepSlots, number: int | None, cache: KvCache) -> None:
    """Compare a slot with what a step on the cache reads."""
    assert number is not None
    buffers = slots.buffers[number]
    for index, (whole, text, visual) in enumerate(zip(slots.arrays, cache.text, cache.visual, strict=True)):
        expected = np.concatenate([visual[1:], text[1:]])
        length = int(buffers.lengths[index // 2])
        assert length == len(expected) < whole.shape[2]
        np.testing.assert_array_equal(whole[number, :, :length].swapaxes(0, 1), expected)


def check_all(slots: StepSlots, *caches: KvCache) -> list[int | None]:
    """Place caches, and compare them all after the last of them was."""
    numbers = slots.place(caches)
    for number, cache in zip(numbers, caches, strict=True):
        check(slots, number, cache)
    return numbers


def test_conversations_lie_side_by_side() -> None:
    slots, caches = StepSlots(4, 3), [cache_of(5 + number, visual=number) for number in range(3)]
    assert check_all(slots, *caches[:2]) == [0, 1]
    arrays = slots.arrays
    assert check_all(slots, caches[2], caches[0], caches[1]) == [2, 0, 1]
    assert slots.arrays is arrays and arrays[0].shape[:2] == (4, 2)
    caches = [cache.append(some(1), 0, 1) for cache in caches]
    assert check_all(slots, *caches) == [0, 1, 2]


def test_who_needs_more_room_leaves_the_others_right() -> None:
    slots, caches = StepSlots(3, 3), [cache_of(5), cache_of(7), cache_of(6)]
    check_all(slots, *caches)
    arrays = slots.arrays
    caches[1] = caches[1].append(some(CAPACITY), 0, CAPACITY)  # its text lies elsewhere from now on
    assert check_all(slots, *caches) == [0, 1, 2]
    assert slots.arrays is not arrays and slots.arrays[0].shape[2] > CAPACITY


def test_the_last_moves_into_a_gap_that_an_end_leaves() -> None:
    slots, caches = StepSlots(4, 3), [cache_of(5 + number) for number in range(4)]
    check_all(slots, *caches)
    del caches[1:3]
    gc.collect()
    assert check_all(slots, caches[1]) == [3]  # alone it lies where it lay
    assert check_all(slots, *caches) == [0, 1]
    assert check_all(slots, *caches, cache_of(9)) == [0, 1, 2]


def test_who_only_misses_a_pass_keeps_the_slot() -> None:
    slots, caches = StepSlots(3, 3), [cache_of(5 + number) for number in range(3)]
    check_all(slots, *caches)
    assert check_all(slots, caches[0], caches[2]) == [0, 2]
    assert check_all(slots, *caches) == [0, 1, 2]


def test_who_rests_gives_way_and_who_finds_no_slot_is_told() -> None:
    slots, caches = StepSlots(2, 3), [cache_of(5 + number) for number in range(3)]
    check_all(slots, *caches[:2])
    for _ in range(step_slots._IDLE // 2):  # passes of two calls
        assert slots.place([caches[2]]) == [None]
        assert check_all(slots, caches[0]) == [0]
    assert check_all(slots, caches[0], caches[2]) == [0, 1]
    assert slots.place([caches[1]]) == [None]


def test_memory_shrinks_when_nobody_else_needs_it() -> None:
    slots, large = StepSlots(2, 3), cache_of(CAPACITY)
    check_all(slots, large)
    assert check_all(slots, large, cache_of(5)) == [0, 1]
    assert slots.arrays[0].shape[2] == 2 * CAPACITY
    del large
    gc.collect()
    check_all(slots, cache_of(5))
    assert slots.arrays[0].shape[2] == CAPACITY


def test_no_memory_is_an_error_that_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    slots, cache = StepSlots(2, 3), cache_of(5)
    check_all(slots, cache)

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(step_slots, "new_arrays", fail)
        slots.place([cache, cache_of(CAPACITY)])
    check_all(slots, cache, cache_of(CAPACITY))
