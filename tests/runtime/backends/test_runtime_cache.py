"""The KV cache: a step writes its own rows and copies nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from edgeprune.bundle import Bundle, DecoderShape
from edgeprune.plan import Cut, Geometry
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime import load
from edgeprune.runtime.backends.kv_cache import KvArrays, KvCache

SHAPE = DecoderShape(layers=2, kv_heads=2, head_dim=4, hidden=8, vocabulary=16, position_axes=1, context=64)
PLAN = unpruned_plan("llava", 2, Geometry(56, 56, 14, 1))


def rows(*lengths: int, of: float = 1.0) -> KvArrays:
    """Return what a step adds to keys and values of two layers, numbered from `of` on."""
    return tuple(np.full((length, 2, 4), of, np.float32) + np.arange(length, dtype=np.float32)[:, None, None] for length in lengths)


def addresses(cache: KvCache) -> list[int]:
    return [array.__array_interface__["data"][0] for array in cache.text]


def test_text_is_written_behind_text_and_never_moves() -> None:
    cache = KvCache.empty(SHAPE, PLAN).reserve(20).append(rows(5, 5, 5, 5), 5, 0)
    began = addresses(cache)
    for step in range(15):
        cache = cache.append(rows(1, 1, 1, 1, of=100.0 + step), 0, 1)
    assert addresses(cache) == began
    expected = [0.0, *range(1, 6), *range(100, 115)]
    assert all(array[:, 1, 2].tolist() == expected for array in cache.text)
    assert cache.bytes == 4 * 20 * 2 * 4 * 4


def test_text_that_was_not_announced_is_taken_in_too() -> None:
    cache = KvCache.empty(SHAPE, PLAN).reserve(2)
    for step in range(4):
        cache = cache.append(rows(1, 1, 1, 1, of=float(step)), 0, 1)
    assert cache.text[0][:, 0, 0].tolist() == [0, 0, 1, 2, 3]


def test_an_image_stands_between_prefix_and_suffix() -> None:
    cache = KvCache.empty(SHAPE, PLAN).reserve(30).append(rows(2 + 6 + 3, 2 + 6 + 3, 2 + 4 + 3, 2 + 4 + 3), 2, 3)
    assert cache.text[0][:, 0, 0].tolist() == [0, 1, 2, 9, 10, 11]
    assert cache.text[2][:, 0, 0].tolist() == [0, 1, 2, 7, 8, 9]
    assert cache.visual[0][:, 0, 0].tolist() == [0, *range(3, 9)] and len(cache.visual[2]) == 5
    assert cache.visual_entries_read == 6 + 4


def test_a_share_is_a_view_and_the_next_question_has_all_again() -> None:
    cache = KvCache.empty(SHAPE, PLAN).reserve(30).append(rows(9, 9, 9, 9), 1, 0)
    shorter = cache.limit_visual(0.5, 1)
    assert [len(array) for array in shorter.visual] == [9, 9, 5, 5]
    assert np.shares_memory(shorter.visual[2], cache.visual[2])
    after = shorter.append(rows(1, 1, 1, 1), 0, 1)
    assert [len(array) for array in after.visual] == [9, 9, 5, 5] and after.limit_visual(1.0, 0).visual_entries_read == 16


def test_layers_may_have_shares_of_their_own() -> None:
    cache = KvCache.empty(SHAPE, PLAN).reserve(30).append(rows(9, 9, 9, 9), 1, 0)
    shorter = cache.limit_visual([0.25, 0.75], 0)
    assert [len(array) for array in shorter.visual] == [3, 3, 7, 7] and np.shares_memory(shorter.visual[0], cache.visual[0])
    assert [len(array) for array in cache.limit_visual([1.0, 0.5], 1).visual] == [9, 9, 5, 5]
    assert shorter.limit_visual(1.0, 0).visual_entries_read == 16


def test_a_second_image_joins_the_first() -> None:
    cache = KvCache.empty(SHAPE, PLAN).reserve(30).append(rows(4, 4, 4, 4), 1, 0).append(rows(3, 3, 3, 3, of=50.0), 0, 1)
    assert cache.visual[0][:, 0, 0].tolist() == [0, 2, 3, 4, 50, 51]
    assert cache.text[0][:, 0, 0].tolist() == [0, 1, 52]


def test_places_stand_beside_keys_and_are_limited_with_their_layer() -> None:
    plan = PLAN.with_cuts(Cut("cache", "plphp", 4, layer=1))
    cache = KvCache.empty(replace(SHAPE, local_layers=(0, 1)), plan)
    assert [array.shape for array in cache.text[4:]] == [(1, 1), (1, 2)] and cache.layers == (0, 0, 1, 1, 0, 1)
    whole, each = np.arange(11)[:, None], np.tile(np.arange(9)[:, None], 2)
    cache = cache.append((*rows(11, 11, 9, 9), whole, each), 2, 3)
    assert cache.text[4][:, 0].tolist() == [0, 0, 1, 8, 9, 10] and cache.visual[5][:, 1].tolist() == [0, 2, 3, 4, 5]
    assert [len(array) for array in cache.limit_visual(0.5, 1).visual] == [7, 7, 3, 3, 7, 3]
    assert cache.visual_entries_read == 6 + 4


@pytest.mark.parametrize("prune", [True, False])
def test_an_answer_allocates_once(tiny_bundle: Bundle, tiny_image: Image.Image, prune: bool) -> None:
    chat = load(tiny_bundle.path).chat(prune=prune)
    stream, seen = chat.ask("Where is the cup?", tiny_image, max_tokens=12), set[int]()
    for _ in stream:
        seen.add(addresses(chat._conversation.cache)[0])
    assert stream.receipt.generated_tokens > 3 and len(seen) == 1
