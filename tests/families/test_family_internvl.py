"""InternVL3 against transformers: what an image is in the text, and what the encoder makes of its tiles."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_internvl
import torch
from tiny_folders import cut
from transformers import InternVLForConditionalGeneration, LlamaConfig, Qwen3Config
from transformers.models.internvl.processing_internvl import InternVLProcessor

from edgeprune.errors import UnsupportedModelError
from edgeprune.families.internvl import InternVL
from edgeprune.plan import Geometry, View

UPSTREAM = SimpleNamespace(
    start_image_token="<img>",
    end_image_token="</img>",
    image_token="<IMG_CONTEXT>",
    image_seq_length=4,
)


def model_of(**vision: Any) -> Any:
    """Return a model of random weights."""
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(tiny_internvl.config(**vision)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def tiled(count: int, side: int = 56, frames: int = 1) -> Geometry:
    """Return a row of tiles, or the frames of a video."""
    per = side // 28
    views = tuple(View(0, 0, side, side, per, per) for _ in range(count))
    return Geometry(side, side * count, 14, 2, views if count > 1 else (), frames, 1.0 if frames > 1 else 0.0)


def test_all_tiles_stand_between_one_pair_of_marks() -> None:
    text = InternVL(model_of()).image_text(tiled(3))
    upstream = InternVLProcessor.replace_image_token(UPSTREAM, {"num_patches": [3]}, 0)
    assert (text.kind, text.placeholder, text.token) == ("image", "<IMG_CONTEXT>", 456)
    assert text.text.replace("<IMG_CONTEXT>", "<IMG_CONTEXT>" * 12) == upstream


def test_every_frame_stands_between_marks_of_its_own() -> None:
    text = InternVL(model_of()).image_text(tiled(3, frames=3))
    upstream = InternVLProcessor.replace_video_token(UPSTREAM, {"pixel_values_videos": [torch.zeros(3, 1)]}, 0)
    assert (text.kind, text.placeholder) == ("video", "<video>")
    assert text.text.replace("<IMG_CONTEXT>", "<IMG_CONTEXT>" * 4) == upstream


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("side", [56, 84])  # the table of positions is for 56
@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False},  # InternViT-6B
        {"use_mean_pooling": False},
        {"use_absolute_position_embeddings": False},
    ],
)
def test_tiles_are_encoded_as_in_transformers(vision: dict[str, Any], side: int, count: int) -> None:
    model, geometry = model_of(**vision), tiled(count, side)
    pixels = torch.randn(count, 3, side, side)
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output.flatten(0, 1)
        tower = InternVL(model).vision(geometry)
        actual = tower(cut(pixels, 14))
    assert actual.shape == (1, geometry.tokens, 48) and tower.takes == cut(pixels, 14).shape
    assert error(actual[0], expected) < 1e-5


@pytest.mark.parametrize("name", ["lambda_1", "lambda_2"])
def test_a_forgotten_layer_scale_would_be_noticed(name: str) -> None:
    model, pixels = model_of(), torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output[0]
        getattr(model.model.vision_tower.encoder.layer[0], name).fill_(1.0)
        assert error(InternVL(model).vision(tiled(1))(cut(pixels, 14))[0], expected) > 1e-2


def test_the_signals_are_what_the_class_tokens_attend_to() -> None:
    model, pixels = model_of(), torch.randn(3, 3, 56, 56)
    model.model.vision_tower.set_attn_implementation("eager")
    with torch.no_grad():
        seen = model.get_image_features(pixels, output_attentions=True)
        tower: Any = InternVL(model).vision(tiled(3), signals=True)
        visual, received, keys, features = tower(cut(pixels, 14))
        assert error(tower.projector(features), visual[0]) < 1e-6
    patches = seen.attentions[-2][:, :, 0, 1:].mean(dim=1)  # [views, patches] of 4 x 4
    expected = patches.view(3, 2, 2, 2, 2).mean(dim=(2, 4)).flatten()
    assert error(received, expected) < 1e-5 and keys.shape == (12, 8)
    assert error(visual[0], seen.pooler_output.flatten(0, 1)) < 1e-5


def test_a_dynamic_scaling_changes_nothing_within_the_context() -> None:
    model = model_of()
    parts, positions = InternVL(model).decoder(), torch.arange(1024)[None]
    rotary = model.model.language_model.rotary_emb
    cos, sin = rotary(rotary.inv_freq, positions)
    assert parts.context == 1024
    assert torch.equal(parts.rope(positions)[0], cos[0]) and torch.equal(parts.rope(positions)[1], sin[0])
    assert rotary.rope_type == "dynamic"  # the model keeps its own
    rope: Any = parts.rope
    assert torch.export.export(rope, (positions,)).graph_module is not None  # nothing depends on the length


@pytest.mark.parametrize("text", [LlamaConfig(), Qwen3Config()])
def test_other_plain_text_models_are_taken(text: Any) -> None:
    config = tiny_internvl.config()
    config.text_config = text
    InternVL.check(config)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"vision_feature_layer": -2}, "layer -2"),
        ({"vision_feature_select_strategy": "full"}, "'full'"),
        ({"text_config": SimpleNamespace(model_type="qwen3_moe")}, "'qwen3_moe'"),
        ({"text_config": SimpleNamespace(model_type="gpt_oss")}, "'gpt_oss'"),
        ({"vision_config": SimpleNamespace(model_type="siglip_vision_model")}, "'siglip_vision_model'"),
        ({"vision_config": SimpleNamespace(model_type="internvl_vision", patch_size=(14, 16))}, "not square"),
    ],
)
def test_twists_are_refused(change: dict[str, Any], what: str) -> None:
    config = tiny_internvl.config()
    for name, value in change.items():
        object.__setattr__(config, name, value)
    with pytest.raises(UnsupportedModelError, match=what):
        InternVL.check(config)


def test_settings_fix_the_number_of_tiles() -> None:
    own = InternVL.settings(tiny_internvl.config(), tiny_internvl.processor(), (112, 168))
    assert (own["min_patches"], own["max_patches"], own["crop_to_patches"], own["patch_size"], own["merge_size"]) == (
        6,
        6,
        True,
        14,
        2,
    )
    own = InternVL.settings(tiny_internvl.config(), tiny_internvl.processor(), (100, 168))
    assert (own["min_patches"], own["max_patches"]) == (1, 12)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, of the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())
