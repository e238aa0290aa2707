"""Attention row block by row block, as graphs for CPUs hold it, against the eager decoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from edgeprune.bundle.graph_io import decoder_inputs, decoder_outputs
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.export.passes import attention as blocked
from edgeprune.export.tracing import trace_decoder
from edgeprune.families.base import DecoderParts
from edgeprune.model import PrunedDecoder, Segment
from edgeprune.model.attention import BlockMask
from edgeprune.model.cache import LayerCache
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime.backends.onnxruntime_steps import empty_buffers
from edgeprune.targets import TARGETS, Lowering

CPU = Lowering(TARGETS["cpu"], "fp32")
GEOMETRY = Geometry(height=280, width=280, patch=14, merge=2)  # 10 x 10 visual tokens
Lengths = tuple[int, int, int, int, int]
LENGTHS: dict[str, Lengths] = {  # prefix, visual, suffix, earlier text, earlier visual tokens
    "first image": (10, 100, 20, 0, 0),
    "second image": (10, 100, 20, 33, 50),
    "unpruned image": (90, 0, 7, 0, 0),
    "long text": (0, 0, 70, 40, 50),
    "short text": (0, 0, 3, 40, 50),
    "decode step": (0, 0, 1, 40, 50),
}


def plan() -> KeepPlan:
    cuts = Cut("layer", "fastv", 50, layer=1), Cut("cache", "plphp", 20, layer=1)
    return unpruned_plan("qwen2_vl", 2, GEOMETRY).with_cuts(*cuts)


class Pair:
    """A decoder, eager and as a graph."""

    def __init__(self, parts: DecoderParts, folder: Path) -> None:
        self.parts, self.eager = parts, PrunedDecoder(parts, plan()).eval()
        trace_decoder(parts, 3, plan(), CPU, folder / "decoder.onnx")
        self.session = onnxruntime.InferenceSession(folder / "decoder.onnx", providers=["CPUExecutionProvider"])

    def difference(self, lengths: Lengths, positions: torch.Tensor | None = None) -> float:
        """Return the largest difference of any output for random tokens, at positions in a row or at those given."""
        generator, (before, visual, after, text, kept) = torch.Generator().manual_seed(sum(lengths)), lengths
        rows = torch.arange(before + visual + after).expand(3, -1) + text + kept if positions is None else positions
        places = torch.split(rows, [before, visual, after], dim=1)
        embeds = [torch.randn(1, n, self.parts.hidden, generator=generator) for n in (before, visual, after)]
        segments = [Segment(*each) for each in zip(embeds, places, strict=True)]
        heads, width = self.parts.kv_heads, self.parts.head_dim
        held = (1 + text,) * 2 + (1 + kept,) * 2
        caches = [LayerCache(*(torch.randn(count, heads, width, generator=generator) for count in held)) for _ in range(2)]
        with torch.no_grad():
            output = self.eager(*segments, caches, torch.arange(visual))
        expected = [output.logits, *self.eager.flat_rows(output.rows), *output.kept]
        past = [rows for cache in caches for rows in (cache.key, cache.value)]
        past += [rows for cache in caches for rows in (cache.visual_key, cache.visual_value)]
        values = [*embeds, *places, torch.arange(visual), *past]
        feeds = {name: value.numpy() for name, value in zip(decoder_inputs(plan()), values, strict=True)}
        actual = self.session.run(decoder_outputs(plan()), feeds | empty_buffers(self.session))
        return max(float(np.abs(a - e.numpy()).max(initial=0.0)) for a, e in zip(actual, expected, strict=True))


@pytest.fixture(scope="module")
def pair(even: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(even.family.decoder(), tmp_path_factory.mktemp("blocked"))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_blocks_attend_as_the_whole_does(pair: Pair, lengths: Lengths) -> None:
    assert pair.difference(lengths) < 1e-4


def test_text_between_the_tiles_of_an_image_may_stand_anywhere(pair: Pair) -> None:
    # Half of the prefix comes after half of the image.
    before, visual = torch.arange(40), torch.arange(100)
    row = torch.cat([before + 50 * (before >= 20), 20 + visual + 20 * (visual >= 50), 140 + torch.arange(10)])
    assert pair.difference((40, 100, 10, 0, 0), row.expand(3, -1)) < 1e-4


@pytest.mark.slow
def test_tokens_that_all_see_each_other_do_so_in_every_block(even: LoadedModel, tmp_path: Path) -> None:
    pair = Pair(replace(even.family.decoder(), bidirectional=True), tmp_path)
    assert pair.difference((10, 100, 20, 0, 0)) < 1e-4


@pytest.mark.usefixtures("fresh_traces")
def test_a_block_that_ends_too_early_is_seen(even: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = BlockMask.of
    monkeypatch.setattr(BlockMask, "of", lambda *given: replace(whole(*given), reach=(whole(*given).reach - 1).clamp(min=1)))
    assert Pair(even.family.decoder(), tmp_path).difference((10, 100, 20, 0, 0)) > 1e-3


def test_both_ways_are_taken(pair: Pair) -> None:
    steps = [sum(lengths[:3]) for lengths in LENGTHS.values()]
    assert min(steps) < blocked.MIN_BLOCKED_LENGTH < max(steps)
