"""Answers of graphs whose decode steps read buffers: they say what steps on the caches say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from plans import BASE, PLANS, PROMPT

from edgeprune.benchmark.profile import step_nodes
from edgeprune.bundle.graph_io import LENGTHS
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.export.tracing import trace_decoder
from edgeprune.plan import KeepPlan
from edgeprune.runtime import Runtime, load
from edgeprune.runtime.backends import onnxruntime as backend
from edgeprune.runtime.backends.onnxruntime_steps import BoundStep
from edgeprune.targets import TARGETS, Lowering

CPU = Lowering(TARGETS["cpu"], "fp32")
WORDS = 7


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
    ["live classes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "input, layers", "cache, schedule"))],
)
def test_steps_on_buffers_say_the_same(name: str, tiny: LoadedModel, tiny_image: Image.Image, tmp_path: Path) -> None:
    bundle = export_bundle(tiny, PLANS.get(name, BASE), tmp_path / "bundle", lowering=CPU)
    said, seen, nodes = [], [], []
    for buffers in (False, True):
        with pytest.MonkeyPatch.context() as patch, load(bundle.path) as runtime:
            seen.append(Seen(patch, buffers=buffers))
            said.append(talk(runtime, tiny_image))
            nodes.append(step_nodes(bundle, threads=1) or 0)
    assert nodes[1] < nodes[0]
    assert said[0] == said[1]
    assert seen[0].bound == 0 < 4 * WORDS <= seen[1].bound
    for expected, actual in zip(seen[0].logits, seen[1].logits, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("precision", ["int8", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp32", "int4"))])
def test_steps_that_rotate_inside_their_attention_say_the_same(
    precision: str, even: LoadedModel, tiny_image: Image.Image, tmp_path: Path
) -> None:
    bundle = export_bundle(even, replace(BASE, layers=2), tmp_path / "bundle", lowering=replace(CPU, precision=precision))
    said, seen = [], []
    for buffers in (False, True):
        with pytest.MonkeyPatch.context() as patch, load(bundle.path) as runtime:
            seen.append(Seen(patch, buffers=buffers))
            said.append(talk(runtime, tiny_image))
    assert said[0] == said[1] and seen[1].bound >= 4 * WORDS
    for expected, actual in zip(seen[0].logits, seen[1].logits, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["cache, schedule", pytest.param("plain", marks=pytest.mark.slow)])
def test_steps_on_8_bits_say_nearly_the_same(name: str, even: LoadedModel, tiny_image: Image.Image, tmp_path: Path) -> None:
    plan = PLANS.get(name, BASE)
    plan = KeepPlan("qwen2_vl", 2, plan.geometry, tuple(cut for cut in plan.cuts if cut.layer is None or cut.layer < 2))
    seen = []
    for kv in ("same", "int8"):
        bundle = export_bundle(even, plan, tmp_path / kv, lowering=replace(CPU, kv=kv))
        assert bundle.manifest.kv == kv
        with pytest.MonkeyPatch.context() as patch, load(bundle.path) as runtime:
            seen.append(Seen(patch, buffers=True))
            runtime.generate(tiny_image, PROMPT, max_tokens=2)
    first, second = zip(*(one.logits for one in seen), strict=True)
    np.testing.assert_array_equal(first[0], first[1])  # a prompt reads what was computed
    np.testing.assert_allclose(second[1], second[0], atol=0.02 * np.abs(second[0]).max())
    assert not np.array_equal(second[0], second[1])


def test_what_has_no_buffers_has_no_8_bit_cache(tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read an 8-bit KV cache") as refused:
        export_bundle(tiny, PLANS["everything"], tmp_path / "bundle", lowering=replace(CPU, kv="int8"))
    assert refused.value.hint == "Leave --kv out." and not (tmp_path / "bundle").exists()
    with pytest.raises(UsageError, match="Target 'jetpack6' has no 8-bit KV cache"):
        Lowering(TARGETS["jetpack6"], "fp16", kv="int8")


def test_who_follows_every_step_has_no_buffers(tiny: LoadedModel, tmp_path: Path) -> None:
    record = trace_decoder(tiny.family.decoder(), 3, PLANS["everything"], CPU, tmp_path / "decoder.onnx")
    assert LENGTHS not in record.inputs
