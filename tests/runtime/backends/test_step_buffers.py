"""Decode steps on one buffer: they say what steps on the caches say, whatever happens to the conversation between them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from plans import BASE, PLANS, PROMPT

from edgeprune.benchmark.profile import step_nodes
from edgeprune.bundle import DecoderShape
from edgeprune.bundle.graph_io import LENGTHS
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.export.exporter import export_bundle
from edgeprune.export.tracing import trace_decoder
from edgeprune.plan import KeepPlan
from edgeprune.runtime import Runtime, load
from edgeprune.runtime.backends import onnxruntime as backend
from edgeprune.runtime.backends.kv_cache import KvArrays, KvCache
from edgeprune.runtime.backends.onnxruntime_steps import BoundStep
from edgeprune.runtime.backends.step_buffers import CAPACITY, Recent, StepBuffers
from edgeprune.targets import TARGETS, Lowering

CPU = Lowering(TARGETS["cpu"], "fp32")
WORDS = 7
SHAPE = DecoderShape(layers=3, hidden=48, kv_heads=2, head_dim=8, vocabulary=100, context=64, position_axes=3)
draws = np.random.default_rng(0)


class Seen:
    """What the steps of a conversation gave, and how many of them read buffers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, buffers: bool) -> None:
        self.logits: list[np.ndarray] = []
        self.bound = 0
        forward, step = backend.OnnxRuntimeBackend.forward, BoundStep.forward

        def seen(own: Any, *given: Any, **named: Any) -> Any:
            output = forward(own, *given, **named)
            self.logits.append(output.logits)
            return output

        def counted(own: Any, *given: Any) -> Any:
            self.bound += 1
            return step(own, *given)

        monkeypatch.setattr(backend.OnnxRuntimeBackend, "forward", seen)
        monkeypatch.setattr(BoundStep, "forward", counted)
        if not buffers:
            monkeypatch.setattr(backend, "can_step", lambda *_: False)


def talk(runtime: Runtime, image: Image.Image) -> list[Any]:
    """Hold two conversations in turns, the second of them cut short once, and return what was said and read."""
    said: list[Any] = []
    first, second = runtime.chat(), runtime.chat()
    said.append("".join(first.ask(PROMPT, image, max_tokens=WORDS)))
    stream = second.ask(PROMPT, image, max_tokens=WORDS)
    said.append([part for part, _ in zip(stream, range(2), strict=False)])
    stream.cancel()
    said += list(stream)
    for chat in (first, second, first):
        stream = chat.ask("And the ball?", max_tokens=WORDS)
        said += ["".join(stream), stream.receipt.decode_shares, stream.receipt.visual_reads]
    said.append("".join(first.ask("Which is new?", image, max_tokens=WORDS)))
    return said


@pytest.mark.parametrize(
    "name",
    ["cache, schedule", "live classes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "input, layers"))],
)
def test_steps_on_buffers_say_the_same(name: str, tiny: LoadedModel, tiny_image: Image.Image, tmp_path: Path) -> None:
    bundle = export_bundle(tiny, PLANS.get(name, BASE), tmp_path / "bundle", lowering=CPU)
    said, seen, nodes = [], [], []
    for buffers in (False, True):
        with pytest.MonkeyPatch.context() as patch, load(bundle.path) as runtime:
            seen.append(Seen(patch, buffers=buffers))
            said.append(talk(runtime, tiny_image))
            nodes.append(step_nodes(bundle, threads=1))
    assert nodes[1] < nodes[0]
    assert said[0] == said[1]
    assert seen[0].bound == 0 < 4 * WORDS <= seen[1].bound
    for expected, actual in zip(seen[0].logits, seen[1].logits, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_who_follows_every_step_has_no_buffers(tiny: LoadedModel, tmp_path: Path) -> None:
    record = trace_decoder(tiny.family.decoder(), 3, PLANS["everything"], CPU, tmp_path / "decoder.onnx")
    assert LENGTHS not in record.inputs


def some(count: int) -> KvArrays:
    return tuple(draws.standard_normal((count, 2, 8)).astype(np.float32) for _ in range(6))


def cache_of(text: int, visual: int = 0) -> KvCache:
    """Return a cache of random rows, with room for as much text as its buffers have."""
    empty = KvCache.empty(SHAPE, KeepPlan("qwen2_vl", 3, BASE.geometry))
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
