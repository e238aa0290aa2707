"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision against transformers: visual tokens of all layouts, signals, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_llava
import tiny_llava_next
import tiny_llava_onevision
import torch
from PIL import Image
from test_family_encoder import error
from tiny_folders import cut
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration, LlavaOnevisionForConditionalGeneration
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from edgeprune.errors import UnsupportedModelError
from edgeprune.families.llava import Llava
from edgeprune.families.llava_onevision import LlavaNext, LlavaOneVision
from edgeprune.model.decoder import PrunedDecoder, Segment
from edgeprune.plan import Cut, Geometry, View
from edgeprune.plan.presets import unpruned_plan
from edgeprune.processors import image_spec

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
MANY = [[72 * rows, 72 * columns] for rows in range(1, 5) for columns in range(1, 5)]
SQUARE = Geometry(70, 70, 14, 1)


def random(kind: Any, config: Any) -> Any:
    """Return a model of random weights."""
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def llava(encoder: str = CLIP, **changes: Any) -> Any:
    strategy = "default" if encoder == CLIP else "full"
    changes = {"vision_feature_select_strategy": strategy} | changes
    return random(LlavaForConditionalGeneration, tiny_llava.config(encoder=encoder, **changes))


def onevision(**changes: Any) -> Any:
    return random(LlavaOnevisionForConditionalGeneration, tiny_llava_onevision.config(**changes))


def llava_next(encoder: str = CLIP, **changes: Any) -> Any:
    vision = tiny_llava.VISION | {"model_type": encoder, "patch_size": 14, "image_size": 72}
    changes = {"vision_config": vision, "vision_feature_select_strategy": "default" if encoder == CLIP else "full"} | changes
    return random(LlavaNextForConditionalGeneration, tiny_llava_next.config(**changes))


@pytest.mark.parametrize("encoder", [CLIP, SIGLIP])
@pytest.mark.parametrize("layer", [-2, -1, [-2, 1]])
def test_a_view_is_encoded_as_in_transformers(encoder: str, layer: int | list[int]) -> None:
    model, pixels = llava(encoder, vision_feature_layer=layer), torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output[0]
        tower: Any = Llava(model).vision(SQUARE)
        assert error(tower(cut(pixels, 14))[0], expected) < 1e-5 and tower.takes == (25, 588)
        tower: Any = Llava(model).vision(SQUARE, signals=True)
        visual, received, keys, features = tower(cut(pixels, 14))
        assert error(tower.projector(features), visual[0]) < 1e-6
    assert error(visual[0], expected) < 1e-5 and received.shape == (25,) and keys.shape == (25, 8)


@pytest.mark.parametrize("layer", [-2, [-2, 1]])
def test_mantis_leaves_out_the_first_patch_as_in_transformers(layer: int | list[int]) -> None:
    model, pixels = llava(SIGLIP, vision_feature_layer=layer, vision_feature_select_strategy="default"), torch.randn(1, 3, 70, 70)
    spec = image_spec(Llava.settings(model.config, tiny_llava.processor() | {"image_processor_type": "SiglipImageProcessor"}))
    geometry, first = spec.geometry(70, 70), Cut("vision", "evit", 7, layer=1)
    assert geometry.layout == (View(0, 14, 14, 56, 1, 4), View(14, 0, 56, 70, 4, 5)) and geometry.tokens == 24
    Llava.check(model.config)
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output[0]
        tower: Any = Llava(model).vision(geometry, signals=True)
        visual, received, keys, features = tower(cut(pixels, 14))
        assert error(tower.projector(features), visual[0]) < 1e-6
        few, kept = Llava(model).vision(geometry, cuts=(first,))(cut(pixels, 14))
        model.model.vision_tower.set_attn_implementation("eager")
        seen = model.model.vision_tower(pixels, output_attentions=True).attentions
    assert error(visual[0], expected) < 1e-5 and keys.shape == (24, 8)
    assert error(received, seen[2][0].mean(dim=(0, 1))[1:]) < 1e-5
    assert few.shape == (1, 7, 48) and kept.tolist() == sorted(seen[0][0].mean(dim=(0, 1))[1:].topk(7).indices.tolist())


def test_a_layer_too_many_would_be_noticed() -> None:
    model, pixels = llava(), torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output[0]
        model.config.vision_feature_layer = -1
        assert error(Llava(model).vision(SQUARE)(cut(pixels, 14))[0], expected) > 1e-2


@pytest.mark.parametrize(
    ("size", "most", "tiles", "tokens"),
    [
        ((60, 60), 9, 1, 5 * 6),  # nothing to shrink, nothing to leave out
        ((80, 120), 9, 4, 6 * 11),  # bars above and below
        ((200, 100), 9, 6, 15 * 9),  # bars on the sides
        ((100, 400), 2, 4, 3 * 15),  # shrunk
        ((288, 288), 1, 16, 5 * 6),
        ((290, 211), 4, 12, 11 * 9),  # shrunk, and bars
    ],
)
def test_tiles_are_packed_as_in_transformers(size: tuple[int, int], most: int, tiles: int, tokens: int) -> None:
    model = onevision(image_grid_pinpoints=MANY, vision_aspect_ratio=f"anyres_max_{most}")
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))
    own = tiny_llava_onevision.processor(MANY)
    made = LlavaOnevisionImageProcessorPil(**own)([image], return_tensors="pt")
    spec = image_spec(LlavaOneVision.settings(model.config, own, size))
    geometry = spec.geometry(*size)
    with torch.no_grad():
        expected = model.get_image_features(made["pixel_values"], made["image_sizes"]).pooler_output[0]
        tower: Any = LlavaOneVision(model).vision(geometry, signals=True)
        visual, received, keys = tower(torch.from_numpy(spec.patches([image])))
    assert (len(made["pixel_values"][0]), geometry.tokens) == (1 + tiles, 25 + tokens)
    assert error(visual[0], expected) < 1e-5
    assert received.shape == (geometry.tokens,) and keys.shape == (geometry.tokens, 8)
    assert tower.takes == (25 * (1 + tiles), 588)


@pytest.mark.parametrize("encoder", [CLIP, SIGLIP])
@pytest.mark.parametrize(
    ("size", "tiles", "tokens", "layer"),
    [
        ((60, 60), 1, 5 * 6, -2),
        ((80, 120), 4, 6 * 11, [-2, 1]),  # bars above and below
        ((200, 100), 6, 15 * 9, -1),  # bars on the sides
        ((288, 288), 16, 20 * 21, -2),  # never shrunk
    ],
)
def test_tiles_of_llava_next_are_packed_as_in_transformers(
    encoder: str, size: tuple[int, int], tiles: int, tokens: int, layer: int | list[int]
) -> None:
    model = llava_next(encoder, image_grid_pinpoints=MANY, vision_feature_layer=layer)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))
    own = tiny_llava_next.processor(MANY)
    made = LlavaNextImageProcessorPil(**own)([image], return_tensors="pt")
    spec = image_spec(LlavaNext.settings(model.config, own, size))
    geometry = spec.geometry(*size)
    with torch.no_grad():
        expected = model.get_image_features(made["pixel_values"], made["image_sizes"]).pooler_output[0]
        tower: Any = LlavaNext(model).vision(geometry, signals=True)
        visual, received, keys = tower(torch.from_numpy(spec.patches([image])))
        assert error(visual[0], expected) < 1e-5
        model.model.image_newline.zero_()
        assert error(tower(torch.from_numpy(spec.patches([image])))[0][0], expected) > 1e-2
    assert (len(made["pixel_values"][0]), geometry.tokens) == (1 + tiles, 25 + tokens)
    assert received.shape == (geometry.tokens,) and keys.shape == (geometry.tokens, 8)


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_first_logits_equal_transformers(text: str) -> None:
    model = llava(text_config=tiny_llava.TEXT | {"model_type": text, "vocab_size": 500, "head_dim": 8})
    pixels = torch.randn(1, 3, 70, 70)
    ids = torch.tensor([[3, 4] + [456] * 25 + [5, 6, 7]])
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits[:, -1]
        assert error(first_logits(Llava(model), SQUARE, cut(pixels, 14), ids), expected) < 1e-5
        assert error(first_logits(Llava(model), SQUARE, -cut(pixels, 14), ids), expected) > 1e-3


def first_logits(family: Any, geometry: Geometry, patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits [1, vocabulary] after a prompt whose tokens of id 456 stand for the image."""
    parts, places = family.decoder(), torch.arange(ids.shape[1])[None]
    begin, count = int(ids.eq(456).int().argmax()), geometry.tokens
    embeds = torch.split(parts.embed_tokens(ids), [begin, count, ids.shape[1] - begin - count], dim=1)
    segments = zip((embeds[0], family.vision(geometry)(patches), embeds[2]), (0, begin, begin + count), strict=True)
    decoder = PrunedDecoder(parts, unpruned_plan(family.name, len(parts.layers), geometry))
    taken = [Segment(rows, places[:, start : start + rows.shape[1]]) for rows, start in segments]
    logits: torch.Tensor = decoder(*taken, decoder.empty_caches()).logits[:, -1]
    return logits


def test_a_newline_tells_nothing_and_the_overview_all_of_its_own() -> None:
    model, spec = onevision(vision_aspect_ratio="anyres_max_9"), tiny_llava_onevision.processor()
    geometry = image_spec(LlavaOneVision.settings(model.config, spec)).geometry(80, 120)
    tower: Any = LlavaOneVision(model).vision(geometry, signals=True)
    with torch.no_grad():
        _, received, keys = tower(torch.randn(tower.takes))
    columns = geometry.layout[1].columns + 1
    lines = received[25:].view(-1, columns)
    assert lines[:, -1].eq(0).all() and lines[:, :-1].gt(0).all() and keys[25 + columns - 1].eq(0).all()
    assert received[:25].sum() == pytest.approx(1.0)


@pytest.mark.parametrize("size", [72, 60])  # 5 x 5 and 4 x 4 patches, pooled to 3 x 3 and 2 x 2
def test_frames_are_pooled_as_in_transformers(size: int) -> None:
    sizes = tiny_llava_onevision.config().vision_config.to_dict() | {"image_size": size}
    model = onevision(vision_config=sizes, image_grid_pinpoints=[[size, size]])
    settings = tiny_llava_onevision.processor() | {"size": {"height": size, "width": size}}
    geometry = image_spec(LlavaOneVision.settings(model.config, settings)).geometry(90, 90, 3, 1.0)
    pixels = torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected = model.model.get_video_features(pixels[None]).pooler_output[0]
        visual, received, _ = LlavaOneVision(model).vision(geometry, signals=True)(cut(pixels, 14))
    assert error(visual[0], expected) < 1e-5 and visual.shape[1] == geometry.tokens
    assert received[-1] == 0 and received[:-1].gt(0).all()


def test_a_forgotten_newline_would_be_noticed() -> None:
    model, settings = onevision(), tiny_llava_onevision.processor()
    geometry = image_spec(LlavaOneVision.settings(model.config, settings)).geometry(80, 120)
    tower: Any = LlavaOneVision(model).vision(geometry)
    with torch.no_grad():
        pixels = torch.randn(tower.takes)
        before = tower(pixels)
        model.model.image_newline.zero_()
        assert error(tower(pixels), before) > 1e-2


def test_packing_is_traced_with_constant_shapes() -> None:
    model, settings = onevision(), tiny_llava_onevision.processor()
    geometry = image_spec(LlavaOneVision.settings(model.config, settings)).geometry(80, 120)
    tower: Any = LlavaOneVision(model).vision(geometry, signals=True)
    program = torch.export.export(tower, (torch.randn(tower.takes),))
    shapes = [tuple(node.meta["val"].shape) for node in program.graph.output_node().args[0]]
    assert shapes == [(1, geometry.tokens, 48), (geometry.tokens,), (geometry.tokens, 8)]
    assert not any(word in str(node.target) for node in program.graph.nodes for word in ("conv", "upsample", "nonzero"))


def test_images_and_videos_stand_in_the_text_as_tokens() -> None:
    still, clip = Geometry(80, 120, 14, 1), Geometry(80, 120, 14, 1, (), 2, 1.0)
    texts = [family.image_text(still) for family in (Llava(llava()), LlavaNext(llava_next()), LlavaOneVision(onevision()))]
    texts.append(LlavaOneVision(onevision()).image_text(clip))
    assert [(text.kind, text.placeholder, text.text, text.token) for text in texts] == [
        *[("image", "<image>", "<image>", 456)] * 3,
        ("video", "<video>", "<video>", 457),
    ]


def test_the_decoder_looks_no_further_than_its_window() -> None:
    text = tiny_llava.TEXT | {"model_type": "mistral", "vocab_size": 500, "sliding_window": 700}
    parts = Llava(llava(text_config=text)).decoder()
    assert (parts.context, parts.head_dim, parts.bidirectional) == (700, 8, False)


@pytest.mark.parametrize(
    ("family", "change", "what"),
    [
        (Llava, {"text_config": SimpleNamespace(model_type="phi")}, "'phi'"),
        (Llava, {"vision_config": SimpleNamespace(model_type="dinov2")}, "'dinov2'"),
        (Llava, {"vision_feature_select_strategy": "full"}, "'full' keeps the class token"),
        (LlavaNext, {"vision_config": SimpleNamespace(model_type=SIGLIP)}, "'default' drops the first patch"),
        (LlavaNext, {"text_config": SimpleNamespace(model_type="phi")}, "'phi'"),
        (LlavaNext, {"vision_config": SimpleNamespace(model_type="pixtral")}, "'pixtral'"),
        (LlavaNext, {"vision_feature_select_strategy": "full"}, "'full' keeps the class token"),
        (LlavaOneVision, {"vision_config": SimpleNamespace(model_type=CLIP)}, "'clip_vision_model'"),
        (LlavaOneVision, {"vision_feature_select_strategy": "default"}, "'default' drops the first patch"),
        (LlavaOneVision, {"text_config": SimpleNamespace(model_type="qwen2_moe")}, "'qwen2_moe'"),
    ],
)
def test_twists_are_refused(family: Any, change: dict[str, Any], what: str) -> None:
    config = {Llava: tiny_llava, LlavaNext: tiny_llava_next, LlavaOneVision: tiny_llava_onevision}[family].config()
    family.check(config)
    for name, value in change.items():
        object.__setattr__(config, name, value)
    with pytest.raises(UnsupportedModelError, match=what):
        family.check(config)


def test_an_image_processor_of_another_size_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"4 x 4 patches, but its vision encoder takes 5 x 5"):
        Llava(llava()).vision(Geometry(56, 56, 14, 1))


def test_settings_have_the_resolution_of_the_tiles() -> None:
    config = tiny_llava_onevision.config(image_grid_pinpoints=MANY)
    own = LlavaOneVision.settings(config, tiny_llava_onevision.processor(), (80, 120))
    assert own["image_grid_pinpoints"] == [[144, 144]] and own["vision_aspect_ratio"] == "anyres_max_1" and own["patch_size"] == 14
    assert LlavaOneVision.settings(config, {}) == {
        "image_grid_pinpoints": MANY,
        "vision_aspect_ratio": "anyres_max_1",
        "patch_size": 14,
    }
    assert Llava.settings(tiny_llava.config(), {"size": {"shortest_edge": 70}}, (56, 56)) == {
        "size": {"shortest_edge": 70},
        "patch_size": 14,
    }
