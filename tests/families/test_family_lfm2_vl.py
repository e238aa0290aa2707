"""LFM2-VL against transformers: views of different sizes in one encoder, short convolutions, and where a cut can act."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_lfm2_vl
import torch
from PIL import Image
from tiny_folders import write_tokenizer
from transformers import Lfm2VlForConditionalGeneration
from transformers.models.lfm2_vl.processing_lfm2_vl import Lfm2VlProcessor

from edgeprune.calibration.calibrate import check_statistics
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.errors import PlanError, UnsupportedModelError, UsageError
from edgeprune.families.lfm2_vl import Lfm2VL, ShortConvolution
from edgeprune.plan import Cut
from edgeprune.plan.presets import unpruned_plan
from edgeprune.processors import image_spec
from edgeprune.registry import applicability


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(resolve_model(str(tiny_lfm2_vl.folder(tmp_path_factory.mktemp("lfm2_vl")))))


def picture(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


SIZES = [(64, 96), (96, 64), (32, 32), (32, 64), (64, 160)]


@pytest.mark.parametrize("size", SIZES)
def test_visual_tokens_equal_transformers(loaded: LoadedModel, size: tuple[int, int]) -> None:
    geometry = loaded.geometry(size)
    patches = image_spec(loaded.settings(geometry)).patches([picture(size)])
    tower = loaded.family.vision(geometry, signals=True).eval()
    with torch.no_grad():
        visual, received, keys, features = tower(torch.from_numpy(patches))
        assert torch.equal(tower.projector(features), visual[0])
        inputs = tiny_lfm2_vl.inputs(loaded.folder.path, [picture(size)])
        expected = torch.cat(loaded.model.get_image_features(**inputs).pooler_output)
    torch.testing.assert_close(visual[0], expected, atol=1e-5, rtol=1e-4)
    assert received.shape == (geometry.tokens,) and keys.shape == (geometry.tokens, 8)
    # The patches of each view receive attention from that view alone, one from each query on average.
    starts = np.cumsum([0, *(view.tokens for view in geometry.layout)])
    for first, last, view in zip(starts, starts[1:], geometry.layout, strict=False):
        assert float(received[first:last].mean()) == pytest.approx(1 / (4 * view.tokens), rel=1e-4)


def test_swapped_patches_are_noticed(loaded: LoadedModel) -> None:
    geometry = loaded.geometry((64, 96))
    patches = torch.from_numpy(image_spec(loaded.settings(geometry)).patches([picture((64, 96))]))
    tower = loaded.family.vision(geometry).eval()
    with torch.no_grad():
        whole = tower(patches)
        tower.order = tower.order.flip(0)
        assert (tower(patches) - whole).abs().max() > 1e-2


@pytest.mark.parametrize("size", SIZES)
def test_the_text_is_that_of_the_processor(loaded: LoadedModel, size: tuple[int, int]) -> None:
    geometry = loaded.geometry(size)
    rows = {view.top for view in geometry.layout} if len(geometry.layout) > 1 else {0}
    columns = {view.left for view in geometry.layout} if len(geometry.layout) > 1 else {0}
    last = geometry.layout[-1]
    written = Lfm2VlProcessor._build_image_tokens(
        SimpleNamespace(  # the processor's names for the tokens
            image_token="<image>",
            image_start_token="<|image_start|>",
            image_end_token="<|image_end|>",
            image_thumbnail_token="<|img_thumbnail|>",
        ),
        len(rows),
        len(columns),
        geometry.layout[0].tokens,
        last.tokens,
        use_thumbnail=True,
        use_image_special_tokens=True,
    )
    expected = loaded.family.image_text(geometry).text
    for view in geometry.layout:
        expected = expected.replace("<image>", "<i>" * view.tokens, 1)
    assert written.replace("<image>", "<i>") == expected


def test_every_view_keeps_as_many(loaded: LoadedModel) -> None:
    geometry = loaded.geometry((64, 96))
    patches = torch.from_numpy(image_spec(loaded.settings(geometry)).patches([picture((64, 96))]))
    with torch.no_grad():
        visual, first, second = loaded.family.vision(
            geometry, cuts=[Cut("vision", "evit", 21, layer=1), Cut("vision", "evit", 14, layer=2)]
        )(patches)
    assert visual.shape[1] == len(second) == 14 and set(second.tolist()) <= set(first.tolist())
    starts = np.cumsum([0, *(view.tokens for view in geometry.layout)])
    assert np.histogram(first.numpy(), starts)[0].tolist() == [3] * 7
    with pytest.raises(PlanError, match="one has 4"):
        loaded.family.vision(geometry, cuts=[Cut("vision", "evit", 35, layer=1)])


def test_a_convolution_in_two_parts_is_one(loaded: LoadedModel) -> None:
    conv = loaded.model.model.language_model.layers[0].conv
    ours, hidden = ShortConvolution(conv), torch.randn(1, 7, 48)
    with torch.no_grad():
        expected = conv(hidden)[0]
        state = torch.zeros(2, 48)
        parts = []
        for rows in torch.split(hidden[0], [1, 4, 2]):
            mixed, state = ours(rows, state)
            parts.append(mixed)
    torch.testing.assert_close(torch.cat(parts), expected, atol=2e-4, rtol=1e-4)


CUTS: list[tuple[list[Cut], str]] = [
    ([Cut("layer", "fastv", 4, layer=1)], "no layer has it before it"),
    ([Cut("layer", "fastv", 8, layer=2), Cut("layer", "fastv", 4, layer=3)], "since the cut before layer 2"),
    ([Cut("layer", "pyramiddrop", 4, layer=2)], "the attention of its layer"),
    ([Cut("cache", "plphp", 4, layer=2)], "layer 2 has none"),
]


@pytest.mark.parametrize(("cuts", "words"), CUTS)
def test_cuts_without_attention_are_refused(loaded: LoadedModel, cuts: list[Cut], words: str) -> None:
    plan = unpruned_plan("lfm2_vl", 4, loaded.geometry((64, 96)))
    with pytest.raises(PlanError, match=words):
        loaded.check_plan(plan.with_cuts(*cuts))


def test_cuts_with_attention_and_those_that_need_none_are_taken(loaded: LoadedModel) -> None:
    plan = unpruned_plan("lfm2_vl", 4, loaded.geometry((64, 96)))
    loaded.check_plan(plan.with_cuts(Cut("layer", "uniform", 8, layer=1), Cut("layer", "fastv", 4, layer=2)))
    loaded.check_plan(plan.with_cuts(Cut("layer", "pyramiddrop", 4, layer=3), Cut("cache", "plphp", 3, layer=3)))


def test_what_applies_says_where() -> None:
    found = {(field.method, field.site): field for field in applicability(Lfm2VL)}
    assert found["plphp", "cache"].layers == "of layers with attention"
    assert found["fastv", "layer"].layers == "after a layer with attention"
    assert found["pyramiddrop", "layer"].layers == "before a layer with attention"
    assert found["uniform", "layer"].layers == ""
    assert "a convolution instead" in found["dyrate", "decode"].reason


@pytest.mark.parametrize(
    ("part", "changed", "words"),
    [
        ("vision_config", {"model_type": "siglip_vision_model"}, "vision encoder"),
        ("text_config", {"model_type": "lfm2_moe"}, "text model 'lfm2_moe'"),
        ("text_config", {"rope_parameters": {"rope_type": "dynamic"}}, "depend on the length"),
        ("text_config", {"layer_types": ["conv"] * 4}, "has attention"),
    ],
)
def test_other_configurations_are_refused(part: str, changed: dict[str, Any], words: str) -> None:
    config = tiny_lfm2_vl.config()
    for name, value in changed.items():
        object.__setattr__(getattr(config, part), name, value)
    with pytest.raises(UnsupportedModelError, match=words):
        Lfm2VL.check(config)


def test_tiles_without_thumbnail_are_all_tiles(loaded: LoadedModel, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, tiny_lfm2_vl.TEMPLATE, *tiny_lfm2_vl.MARKS)
    family = Lfm2VL(Lfm2VlForConditionalGeneration(tiny_lfm2_vl.config(len(tokenizer), 0)))
    geometry = image_spec(tiny_lfm2_vl.processor() | {"use_thumbnail": False}).geometry(64, 96)
    text = family.image_text(geometry).text
    assert text.count("<image>") == 6 and "thumbnail" not in text


def test_statistics_are_refused_and_other_methods_are_not() -> None:
    for method in (None, "auto", "dyrate", "fitprune", "plphp", "vtw"):
        with pytest.raises(UsageError, match="most of a lfm2_vl have none"):
            check_statistics(method, "lfm2_vl")
    check_statistics("divprune", "lfm2_vl")
    check_statistics("plphp", "qwen2_vl")
