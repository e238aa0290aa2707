"""Idefics3, SmolVLM and Idefics2 against transformers: what an image is in the text, and what the encoder makes of its views."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_idefics2
import tiny_idefics3
import tiny_smolvlm
import torch
from PIL import Image
from tiny_folders import cut
from transformers import (
    AutoTokenizer,
    Idefics2ForConditionalGeneration,
    Idefics3ForConditionalGeneration,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics2.processing_idefics2 import Idefics2Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from edgeprune.errors import UnsupportedModelError, UsageError
from edgeprune.families.idefics2 import Idefics2
from edgeprune.families.idefics3 import Idefics3, SmolVLM
from edgeprune.plan import Geometry, View
from edgeprune.processors import image_spec
from edgeprune.runtime.text.prompt import ImagePlaceholders
from edgeprune.runtime.text.tokenizer import TextTokenizer


def model_of(kind: Any, config: Any) -> Any:
    """Return a model of random weights."""
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def tiled(rows: int, columns: int, side: int, patch: int, merge: int) -> Geometry:
    """Return tiles and the whole image, or that alone."""
    per = side // patch // merge
    boxes = [(row * side, column * side) for row in range(rows) for column in range(columns)] if rows * columns > 1 else []
    views = [View(*box, side, side, per, per) for box in boxes] + [View(0, 0, rows * side, columns * side, per, per)]
    return Geometry(rows * side, columns * side, patch, merge, tuple(views) if boxes else ())


def clip(frames: int, fps: float) -> Geometry:
    views = tuple(View(0, 0, 128, 128, 2, 2, time=time) for time in range(frames))
    return Geometry(128, 128, 16, 4, views, frames, fps)


def expanded(text: str, token: str, geometry: Geometry) -> str:
    """Return the text of an image with a token for every visual one."""
    first, *rest = text.split(token)
    assert len(rest) == len(geometry.layout)
    return first + "".join(token * view.tokens + after for view, after in zip(geometry.layout, rest, strict=True))


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 1), (2, 3)])
def test_tiles_stand_in_the_text_as_transformers_writes_them(grid: tuple[int, int], tmp_path: Path) -> None:
    folder = tiny_idefics3.folder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = Idefics3ImageProcessorPil.from_pretrained(folder, size={"longest_edge": 56 * max(grid)})
    picture = Image.new("RGB", (56 * grid[1], 56 * grid[0]))
    upstream = Idefics3Processor(images, tokenizer, image_seq_len=4)(text="See <image>there", images=[[picture]])
    geometry = tiled(*grid, 56, 14, 2)
    text = Idefics3(model_of(Idefics3ForConditionalGeneration, tiny_idefics3.config())).image_text(geometry)
    whole = "See " + expanded(text.text, "<image>", geometry) + "there"
    assert text.placeholder == "<image>" and text.kind == "image" and text.token == 456
    assert tokenizer(whole).input_ids == upstream["input_ids"][0]


@pytest.mark.parametrize(("frames", "fps"), [(2, 1.0), (8, 2.0), (30, 0.25), (64, 24.0), (130, 1.0)])
def test_a_video_stands_in_the_text_as_transformers_writes_it(frames: int, fps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    spelled = {2: "two", 8: "eight", 30: "thirty", 64: "sixty-four", 130: "one hundred and thirty"}
    monkeypatch.setattr(processing_smolvlm, "num2words", spelled.__getitem__)
    upstream = SimpleNamespace(
        image_seq_len=4, image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>"
    )
    metadata = SimpleNamespace(fps=fps, duration=frames / fps, timestamps=[index / fps for index in range(frames)])
    made = {"pixel_values": torch.zeros(1, frames, 1), "video_metadata": [metadata]}
    geometry = clip(frames, fps)
    text = SmolVLM(model_of(SmolVLMForConditionalGeneration, tiny_smolvlm.config())).image_text(geometry)
    assert (text.kind, text.placeholder) == ("video", "<video>")
    assert expanded(text.text, "<image>", geometry) == SmolVLMProcessor.replace_video_token(upstream, made, 0)


def test_a_video_too_long_to_spell_is_refused() -> None:
    with pytest.raises(UsageError, match="1000 frames"):
        SmolVLM(model_of(SmolVLMForConditionalGeneration, tiny_smolvlm.config())).image_text(clip(1000, 1.0))


@pytest.mark.parametrize("splitting", [False, True])
def test_latents_stand_in_the_text_as_transformers_writes_them(splitting: bool, tmp_path: Path) -> None:
    folder = tiny_idefics2.folder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = Idefics2ImageProcessorPil.from_pretrained(folder, do_image_splitting=splitting)
    upstream = Idefics2Processor(images, tokenizer, image_seq_len=12)(
        text="See <image>there", images=[[Image.new("RGB", (98, 70))]]
    )
    geometry = resampled(70, 98, 5 if splitting else 1)
    text = Idefics2(model_of(Idefics2ForConditionalGeneration, tiny_idefics2.config())).image_text(geometry)
    # Its token is counted by the model's tokenizer, whose number for it differs from the tiny configuration's.
    text = replace(text, token=tokenizer.convert_tokens_to_ids("<image>"))
    prompt = ImagePlaceholders(text, geometry, TextTokenizer(folder / "tokenizer.json")).expand("See <image>there")
    assert tokenizer(prompt.replace("<image>", "<image>" * 12)).input_ids == upstream["input_ids"][0]


def resampled(height: int, width: int, count: int) -> Geometry:
    """Return the view that is all of an image, and quarters before it, 12 latents each."""
    views = [View(0, 0, height // 2, width // 2, 1, 12)] * (count - 1) + [View(0, 0, height, width, 1, 12)]
    return Geometry(height, width, 14, 1, tuple(views))


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize(
    ("family", "kind", "config", "sizes"),
    [
        (Idefics3, Idefics3ForConditionalGeneration, tiny_idefics3.config(), (56, 14, 2)),
        (SmolVLM, SmolVLMForConditionalGeneration, tiny_smolvlm.config(), (128, 16, 4)),
        # Tiles larger than those that the table of positions was made for.
        (Idefics3, Idefics3ForConditionalGeneration, tiny_idefics3.config(), (84, 14, 2)),
    ],
)
def test_tiles_are_encoded_as_in_transformers(
    family: Any, kind: Any, config: Any, sizes: tuple[int, int, int], grid: tuple[int, int]
) -> None:
    model, geometry = model_of(kind, config), tiled(*grid, *sizes)
    pixels = torch.randn(len(geometry.layout), 3, sizes[0], sizes[0])
    with torch.no_grad():
        expected = model.get_image_features(pixels[None]).pooler_output[0]
        tower = family(model).vision(geometry)
        actual = tower(cut(pixels, sizes[1]))
    assert actual.shape == (1, geometry.tokens, 48) and tower.takes == cut(pixels, sizes[1]).shape
    assert error(actual[0], expected) < 1e-5


def test_a_wrong_order_of_patches_would_be_noticed() -> None:
    model, geometry = model_of(Idefics3ForConditionalGeneration, tiny_idefics3.config()), tiled(1, 2, 56, 14, 2)
    pixels = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        expected = model.get_image_features(pixels[None]).pooler_output[0]
        tower: Any = Idefics3(model).vision(geometry)
        tower.order = tower.order.sort().values
        assert error(tower(cut(pixels, 14))[0], expected) > 1e-2


def test_the_signals_of_tiles_are_the_attention_of_transformers() -> None:
    model, geometry = model_of(Idefics3ForConditionalGeneration, tiny_idefics3.config()), tiled(1, 2, 56, 14, 2)
    model.model.vision_model.set_attn_implementation("eager")
    pixels = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        seen = model.get_image_features(pixels[None], output_attentions=True)
        tower: Any = Idefics3(model).vision(geometry, signals=True)
        visual, received, keys, features = tower(cut(pixels, 14))
        assert error(tower.projector(features), visual[0]) < 1e-6
    patches = seen.attentions[-2].mean(dim=(1, 2))  # [views, patches] of 4 x 4
    expected = patches.view(3, 2, 2, 2, 2).mean(dim=(2, 4)).flatten()
    assert error(received, expected) < 1e-5 and keys.shape == (12, 8)
    assert error(visual[0], seen.pooler_output[0]) < 1e-5


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("size", [(70, 98), (84, 84), (42, 154), (75, 103)])
def test_latents_are_resampled_as_in_transformers(size: tuple[int, int], count: int) -> None:
    model, geometry = model_of(Idefics2ForConditionalGeneration, tiny_idefics2.config()), resampled(*size, count)
    pixels = torch.randn(count, 3, *size)
    with torch.no_grad():
        expected = model.get_image_features(pixels[None]).pooler_output[0]
        tower = Idefics2(model).vision(geometry)
        actual = tower(cut(pixels, 14))
    assert actual.shape == (1, 12 * count, 48) and tower.takes == cut(pixels, 14).shape
    assert error(actual[0], expected) < 1e-5


def test_quarters_of_a_picture_are_encoded_as_in_transformers(tmp_path: Path) -> None:
    model, settings = model_of(Idefics2ForConditionalGeneration, tiny_idefics2.config()), tiny_idefics2.processor(splitting=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (140, 196, 3), dtype=np.uint8))
    spec = image_spec(Idefics2.settings(model.config, settings, (140, 196)))
    geometry = spec.geometry(140, 196)
    with torch.no_grad():
        expected = model.get_image_features(**tiny_idefics2.inputs(tmp_path, [picture])).pooler_output[0]
        actual = Idefics2(model).vision(geometry)(torch.from_numpy(spec.patches([picture])))
    assert actual.shape == (1, 5 * 12, 48) and error(actual[0], expected) < 1e-5


def test_forgotten_latents_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, geometry = model_of(Idefics2ForConditionalGeneration, tiny_idefics2.config()), resampled(70, 98, 1)
    pixels = torch.randn(1, 3, 70, 98)
    with torch.no_grad():
        expected = model.get_image_features(pixels[None]).pooler_output[0]
        monkeypatch.setattr(model.model.connector.perceiver_resampler, "latents", torch.nn.Parameter(torch.zeros(12, 48)))
        assert error(Idefics2(model).vision(geometry)(cut(pixels, 14))[0], expected) > 1e-2


def test_the_window_of_mistral_bounds_the_context() -> None:
    parts = Idefics2(model_of(Idefics2ForConditionalGeneration, tiny_idefics2.config())).decoder()
    assert parts.context == 1024
    assert (parts.heads, parts.kv_heads, parts.head_dim, parts.hidden, parts.vocabulary) == (6, 2, 8, 48, 500)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model_type": "mixtral"}, "'mixtral'"),
        ({"model_type": "qwen3_moe"}, "'qwen3_moe'"),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}},
            "longrope",
        ),
    ],
)
def test_other_text_models_are_refused(change: dict[str, Any], what: str) -> None:
    config = tiny_idefics3.config(**change)
    with pytest.raises(UnsupportedModelError, match=what):
        Idefics3.check(config)


def test_settings_know_the_patches_of_the_model() -> None:
    own = Idefics3.settings(tiny_idefics3.config(), tiny_idefics3.processor(), (56, 112))
    assert (own["patch_size"], own["merge_size"], own["size"]) == (14, 2, {"longest_edge": 112})
    own = Idefics2.settings(tiny_idefics2.config(), tiny_idefics2.processor())
    assert (own["patch_size"], own["latents"], own["size"]) == (14, 12, {"longest_edge": 98, "shortest_edge": 42})


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, of the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())
