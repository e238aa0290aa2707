"""Kept tokens that count as often as the tokens they stand for: by hand, against a plain bias, as graphs, and across steps."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from learned_weights import input_cut

from edgeprune.bundle.graph_io import decoder_inputs, decoder_outputs
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.errors import PlanError
from edgeprune.export.exporter import export_bundle
from edgeprune.export.passes import attention as blocked
from edgeprune.export.tracing import trace_decoder
from edgeprune.export.verification import verify
from edgeprune.methods.base import InputView, represented, unit
from edgeprune.model import PrunedDecoder, Segment, input_selector
from edgeprune.model.cache import LayerCache
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.targets import TARGETS, Lowering

GEOMETRY = Geometry(height=280, width=280, patch=14, merge=2)  # 10 x 10 visual tokens
BASE = unpruned_plan("qwen2_vl", 2, GEOMETRY)
WEIGHED = BASE.with_cuts(Cut("input", "divprune", 40, options={"weigh": True}))
Tokens = tuple[Segment, Segment, Segment]


def test_by_hand() -> None:
    # Angles in degrees: 10 and 20 are nearer to 0 than to 90, 80 and 170 to 90. Nothing but itself is nearest to 300.
    angles = torch.tensor([0.0, 10.0, 20.0, 80.0, 90.0, 170.0, 300.0]) * math.pi / 180
    places = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert represented(places, torch.tensor([0, 4, 6])).tolist() == [3.0, 3.0, 1.0]


def test_equal_tokens_leave_each_chosen_one_its_own_weight() -> None:
    assert represented(torch.ones(5, 2), torch.tensor([1, 3])).min() == 1.0


@pytest.mark.parametrize("method", ["divprune", "zspaprune", "cdpruner", "dart", "learned"])
def test_the_selection_stays_and_its_weights_are_of_all_tokens(method: str) -> None:
    visual, prompt = (torch.randn(1, n, 12, generator=torch.Generator().manual_seed(n)) for n in (100, 4))
    plain, weighing = (input_selector(BASE.with_cuts(input_cut(method, 9, 12, weigh=weigh)), 12) for weigh in (False, True))
    embeds, kept, logs = weighing(visual, prompt)
    assert [rows.tolist() for rows in (embeds, kept)] == [rows.tolist() for rows in plain(visual, prompt)]
    assert logs.exp().sum().item() == pytest.approx(100)
    metric = weighing.method.places(InputView(visual[0], visual[0])) if method == "learned" else unit(visual[0])
    nearest = [max(range(9), key=lambda place: float(row @ metric[kept[place]])) for row in metric]
    assert logs.exp().round().tolist() == [nearest.count(place) for place in range(9)]


def test_later_cuts_are_refused() -> None:
    for later in (Cut("layer", "fastv", 5, layer=1), Cut("cache", "plphp", 5, layer=0)):
        with pytest.raises(PlanError, match=f"divprune @ input weighs the tokens that it keeps; {later} would drop"):
            WEIGHED.with_cuts(later)


def drawn(parts: Any, lengths: tuple[int, int, int], start: int, seed: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.split(torch.arange(sum(lengths)).expand(3, -1) + start, list(lengths), dim=1)
    embeds = [torch.randn(1, n, parts.hidden, generator=generator) for n in lengths]
    first, second, third = (Segment(*each) for each in zip(embeds, rows, strict=True))
    return first, second, third


@torch.no_grad()
def test_weights_are_a_bias_of_every_step(even: LoadedModel) -> None:
    # An image, then text without one: as one pass of a decoder without weights, biased by hand.
    parts = even.family.decoder()
    image, text = drawn(parts, (3, 40, 5), 0, 1), drawn(parts, (0, 0, 4), 48, 2)
    logs = torch.rand(40, generator=torch.Generator().manual_seed(3)) * 3
    decoder = PrunedDecoder(parts, WEIGHED).eval()
    empty = decoder.empty_caches()
    first = decoder(*image, empty, weights=logs)
    caches = [cache.append(rows, 3, 5) for cache, rows in zip(empty, first.rows, strict=True)]
    step = decoder(*text, caches, every_logit=True)

    suffix = Segment(*(torch.cat([getattr(each[2], name) for each in (image, text)], dim=1) for name in ("embeds", "positions")))
    bias = torch.nn.functional.pad(logs, (3, 9)).expand(52, -1)
    plain = PrunedDecoder(parts, BASE).eval()
    whole = plain(*image[:2], suffix, plain.empty_caches(), bias=bias, every_logit=True)
    assert torch.allclose(first.logits[0], whole.logits[0, 4:5], atol=1e-5)
    assert torch.allclose(step.logits[0], whole.logits[0, 5:], atol=1e-5)
    unweighed = decoder(*image, empty)
    assert not torch.allclose(unweighed.logits, first.logits, atol=1e-3)


@torch.no_grad()
def test_behind_a_withdrawal_there_is_nothing_to_weigh(even: LoadedModel) -> None:
    # A step on the caches gives what one pass over everything gives.
    plan, parts = WEIGHED.with_cuts(Cut("layer", "vtw", 0, layer=1)), even.family.decoder()
    image, text = drawn(parts, (3, 40, 5), 0, 1), drawn(parts, (0, 0, 4), 48, 2)
    logs = torch.rand(40, generator=torch.Generator().manual_seed(3)) * 3
    decoder = PrunedDecoder(parts, plan).eval()
    empty = decoder.empty_caches()
    first = decoder(*image, empty, weights=logs)
    filled: list[Any] = [cache.append(rows, 3, 5) for cache, rows in zip(empty, first.rows, strict=True)]
    text_rows, visual_rows = (
        [getattr(layer, f"{part}{name}") for layer in filled for name in ("key", "value")] for part in ("", "visual_")
    )
    caches = decoder.caches([*text_rows, filled[0].weight, *visual_rows, filled[0].visual_weight])
    step = decoder(*text, caches, every_logit=True)
    suffix = Segment(*(torch.cat([getattr(each[2], name) for each in (image, text)], dim=1) for name in ("embeds", "positions")))
    whole = decoder(*image[:2], suffix, empty, weights=logs, every_logit=True).logits[0]
    torch.testing.assert_close(torch.cat([first.logits[0], step.logits[0]]), whole[4:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(decoder(*image, empty).logits, first.logits, atol=1e-3)


@pytest.mark.parametrize(
    ("lengths", "text", "kept"), [((10, 40, 20), 0, 0), ((10, 40, 20), 33, 40), ((0, 0, 70), 9, 80), ((0, 0, 1), 9, 80)]
)
def test_graphs_weigh_as_the_eager_decoder_does(
    even: LoadedModel, tmp_path: Path, lengths: tuple[int, int, int], text: int, kept: int
) -> None:
    parts = even.family.decoder()
    trace_decoder(parts, 3, WEIGHED, Lowering(TARGETS["cpu"], "fp32"), tmp_path / "decoder.onnx")
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens, logs = drawn(parts, lengths, text + kept, 4), torch.rand(lengths[1], generator=generator) * 3
    held = [torch.rand(1 + rows, 1, generator=generator) * 3 * (rows == kept) for rows in (text, kept)]
    for rows in held:
        rows[0] = 0.0  # null rows
    shape = parts.kv_heads, parts.head_dim
    keys = [torch.randn(1 + rows, *shape, generator=generator) for rows in (text, text, kept, kept) * 2]
    caches = [replace(LayerCache(*keys[layer : layer + 4]), weight=held[0], visual_weight=held[1]) for layer in (0, 4)]
    eager = PrunedDecoder(parts, WEIGHED).eval()
    with torch.no_grad():
        output = eager(*tokens, caches, torch.arange(lengths[1]), weights=logs)
    expected = [output.logits, *eager.flat_rows(output.rows)]
    past = [rows for cache in caches for rows in (cache.key, cache.value)] + held[:1]
    past += [rows for cache in caches for rows in (cache.visual_key, cache.visual_value)] + held[1:]
    values = [*(part.embeds for part in tokens), *(part.positions for part in tokens), torch.arange(lengths[1]), logs, *past]
    feeds = {name: value.numpy() for name, value in zip(decoder_inputs(WEIGHED), values, strict=True)}
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx", providers=["CPUExecutionProvider"])
    actual = session.run(decoder_outputs(WEIGHED), {node.name: feeds[node.name] for node in session.get_inputs()})
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-4)
    assert (sum(lengths) >= blocked.MIN_BLOCKED_LENGTH) == (sum(lengths) > 1)


# Windows and images that see themselves, prompts that see themselves, layers with states.
@pytest.mark.parametrize(
    ("family", "withdrawn"),
    [
        pytest.param("gemma3", True, marks=pytest.mark.slow),
        ("qwen2_vl", False),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("gemma3", "paligemma", "lfm2_vl")),
        pytest.param("qwen2_vl", True, marks=pytest.mark.slow),
    ],
)
def test_bundles_weigh_in_every_kind_of_decoder(family: str, withdrawn: bool, tmp_path: Path) -> None:
    made = importlib.import_module(f"tiny_{family}")
    (tmp_path / "model").mkdir()
    model = load_model(resolve_model(str(made.folder(tmp_path / "model"))))
    geometry = model.geometry(made.SIZE)
    base = unpruned_plan(model.folder.model_type, model.decoder_shape().layers, geometry)
    later = [Cut("layer", "vtw", 0, layer=1)] if withdrawn else []
    plan: KeepPlan = base.with_cuts(Cut("input", "divprune", geometry.tokens // 3, options={"weigh": True}), *later)
    bundle = export_bundle(model, plan, tmp_path / "bundle")
    assert all(stage.passed for stage in verify(bundle, model))
