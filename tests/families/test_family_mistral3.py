"""Mistral 3 and Pixtral against transformers: the text and the visual tokens of an image, signals, cuts, and scaled queries."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_llava
import tiny_mistral3
import torch
from test_family_encoder import error
from test_family_llava import first_logits, random
from tiny_folders import cut
from transformers import LlavaForConditionalGeneration, Mistral3ForConditionalGeneration

from edgeprune.checkpoint.processor import load_processor
from edgeprune.errors import PlanError, UnsupportedModelError
from edgeprune.families.base import text_decoder
from edgeprune.families.llava import Llava
from edgeprune.families.mistral3 import Mistral3
from edgeprune.plan import Cut, Geometry
from edgeprune.runtime.text.prompt import ImagePlaceholders

GRIDS = [(1, 2), (3, 4), (5, 2)]  # transformers fails on an image of one token


def mistral3(**changes: Any) -> Any:
    return lively(Mistral3ForConditionalGeneration, tiny_mistral3.config(**changes))


def lively(kind: Any, config: Any) -> Any:
    """Return a model of random weights whose norms leave attention far from flat."""
    model = random(kind, config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_pre" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.15)
    return model


def pixtral(**changes: Any) -> Any:
    """Return a Pixtral-12B in small: LLaVA's class with Pixtral's encoder."""
    own: dict[str, Any] = {
        "vision_config": tiny_mistral3.PIXTRAL,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    text = tiny_llava.TEXT | {"model_type": "mistral", "vocab_size": 500, "head_dim": 8, "sliding_window": None}
    return lively(LlavaForConditionalGeneration, tiny_llava.config(**({"text_config": text} | own | changes)))


def of_grid(rows: int, columns: int, merge: int) -> Geometry:
    return Geometry(14 * merge * rows, 14 * merge * columns, 14, merge)


def features(model: Any, geometry: Geometry, pixels: torch.Tensor, **options: Any) -> Any:
    """Return what transformers makes of one image."""
    return model.model.get_image_features(pixels, image_sizes=torch.tensor([[geometry.height, geometry.width]]), **options)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("merge", [2, 1])
def test_an_image_is_encoded_as_in_transformers(grid: tuple[int, int], layer: int, merge: int) -> None:
    if merge > 1:
        model = mistral3(vision_feature_layer=layer)
        family: Any = Mistral3(model)
    else:
        model = pixtral(vision_feature_layer=layer)
        family = Llava(model)
    geometry = of_grid(*grid, merge)
    pixels = torch.randn(1, 3, geometry.height, geometry.width)
    with torch.no_grad():
        expected = features(model, geometry, pixels).pooler_output[0]
        tower: Any = family.vision(geometry, signals=True)
        actual = family.vision(geometry)(cut(pixels, 14))
        visual, received, keys, rows = tower(cut(pixels, 14))
        assert error(tower.projector(rows), visual[0]) < 1e-6
    assert actual.shape == (1, geometry.tokens, 48) and tower.takes == cut(pixels, 14).shape
    assert tower.blocks == range(5)[layer]
    assert error(actual[0], expected) < 1e-5 and torch.equal(visual, actual)
    assert received.shape == (geometry.tokens,) and keys.shape == (geometry.tokens, 8)


def test_several_layers_of_pixtral_are_joined_as_in_transformers() -> None:
    model, geometry = pixtral(vision_feature_layer=[-2, 1]), of_grid(3, 4, 1)
    pixels = torch.randn(1, 3, geometry.height, geometry.width)
    with torch.no_grad():
        expected = features(model, geometry, pixels).pooler_output[0]
        assert error(Llava(model).vision(geometry)(cut(pixels, 14))[0], expected) < 1e-5


@pytest.mark.parametrize("broken", ["cos", "order", "norm"])
def test_a_broken_encoder_would_be_noticed(broken: str) -> None:
    model, geometry = mistral3(), of_grid(3, 4, 2)
    pixels = torch.randn(1, 3, geometry.height, geometry.width)
    tower: Any = Mistral3(model).vision(geometry)
    with torch.no_grad():
        expected = features(model, geometry, pixels).pooler_output[0]
        if broken == "norm":
            model.model.multi_modal_projector.norm.weight[0] *= 4
        else:
            table = getattr(tower.encoder, broken)
            table.copy_(table.roll(1, 0))
        assert error(tower(cut(pixels, 14))[0], expected) > 1e-2


def test_the_signals_are_what_patches_attend_to() -> None:
    model, geometry = mistral3(), of_grid(3, 4, 2)
    pixels = torch.randn(1, 3, geometry.height, geometry.width)
    model.model.vision_tower.set_attn_implementation("eager")
    with torch.no_grad():
        seen = features(model, geometry, pixels, output_attentions=True)
        visual, received, *_ = Mistral3(model).vision(geometry, signals=True)(cut(pixels, 14))
    patches = seen.attentions[-2][0].mean(dim=(0, 1))  # [patches] in reading order
    assert error(received, patches.view(3, 2, 4, 2).mean(dim=(1, 3)).flatten()) < 1e-5
    assert error(visual[0], seen.pooler_output[0]) < 1e-5


@pytest.mark.parametrize("merge", [2, 1])
def test_a_cut_in_the_encoder_leaves_whole_tokens_with_their_positions(merge: int) -> None:
    # Attention has no other trace of what left: an image whose dropped patches are gone from the start, with the kept positions.
    model = mistral3() if merge > 1 else pixtral()
    geometry = of_grid(3, 4, merge)
    family: Any = Mistral3(model) if merge > 1 else Llava(model)
    pixels = torch.randn(geometry.tokens * merge**2, 588)
    first = Cut("vision", "evit", 7, layer=1)
    with torch.no_grad():
        whole: Any = family.vision(geometry)
        thinned: Any = family.vision(geometry, cuts=(first,))
        visual, kept = thinned(pixels)
        encoder = whole.encoder
        blocks, states = encoder.encoder, encoder.norm(encoder.patch(pixels[encoder.order]))
        states, weights, _ = blocks.layer(blocks.layers[0], states, encoder.cos, encoder.sin)
        received = weights[0].mean(dim=(0, 1)).view(-1, merge**2).mean(dim=1)
        rows = (kept[:, None] * merge**2 + torch.arange(merge**2)).flatten()
        states = states[rows]
        for layer in blocks.layers[1:]:
            states, _, _ = blocks.layer(layer, states, encoder.cos[rows], encoder.sin[rows])
        assert error(visual[0], whole.projector(states)) < 1e-5
    assert kept.tolist() == sorted(received.topk(7).indices.tolist())
    with pytest.raises(PlanError, match="beyond the vision encoder's 4 blocks"):
        family.vision(geometry, cuts=(replace(first, layer=4),))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_text_of_an_image_is_that_of_the_processor(grid: tuple[int, int], tmp_path: Any) -> None:
    tiny_mistral3.folder(tmp_path)
    processor = load_processor(tmp_path, "mistral3")
    for merge, family in ((2, Mistral3(mistral3())), (1, Llava(pixtral()))):
        processor.patch_size, processor.spatial_merge_size, geometry = 14, merge, of_grid(*grid, merge)
        expected = processor.replace_image_token({"image_sizes": [(geometry.height, geometry.width)]}, 0)
        text = family.image_text(geometry)
        assert (text.kind, text.placeholder, text.token) == ("image", "[IMG]", 456)
        assert text.text.replace("[IMG]", "[IMG]" * geometry.columns) == expected


def test_every_row_is_a_span() -> None:
    geometry = of_grid(3, 4, 2)
    token = Mistral3(mistral3()).image_text(geometry)
    tokenizer: Any = SimpleNamespace(encode=lambda text: [token.token] * text.count("[IMG]"))
    spans = ImagePlaceholders(token, geometry, tokenizer).spans
    assert [[(view.top, view.rows, view.columns) for view in views] for views in spans] == [
        [(0, 1, 4)],
        [(28, 1, 4)],
        [(56, 1, 4)],
    ]


@pytest.mark.parametrize("text", ["ministral3", "mistral"])
def test_the_first_logits_equal_transformers(text: str) -> None:
    model, geometry = mistral3(text=text), of_grid(1, 4, 2)
    pixels, size = torch.randn(1, 3, 28, 112), torch.tensor([[28, 112]])
    ids = torch.tensor([[3, 4, *range(10, 60), *[456] * 4, *range(60, 80)]])  # beyond three steps of the scale
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels, image_sizes=size).logits[:, -1]
        family = Mistral3(model)
        assert error(first_logits(family, geometry, cut(pixels, 14), ids), expected) < 1e-5
        parts = replace(family.decoder(), query_scale=None)
        unscaled: Any = SimpleNamespace(name="mistral3", decoder=lambda: parts, vision=family.vision)
        assert (error(first_logits(unscaled, geometry, cut(pixels, 14), ids), expected) > 1e-3) == (text == "ministral3")


def test_queries_are_scaled_as_in_transformers() -> None:
    from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

    model = mistral3().model.language_model
    parts, positions = text_decoder(model, torch.nn.Identity()), torch.arange(1024)[None]
    assert parts.query_scale is not None
    scale = parts.query_scale(positions)
    assert torch.equal(scale, get_llama_4_attn_scale(positions, 0.1, 16)[0, 0])
    assert scale[15] == 1 and scale[16] > 1 and len(set(scale.flatten().tolist())) == 64
    cos, sin = model.rotary_emb(model.rotary_emb.inv_freq, positions)
    assert torch.equal(parts.rope(positions)[0], cos[0]) and torch.equal(parts.rope(positions)[1], sin[0])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"text_config": SimpleNamespace(model_type="mistral4")}, "'mistral4'"),
        ({"vision_config": SimpleNamespace(model_type="siglip_vision_model")}, "'siglip_vision_model'"),
        ({"vision_feature_layer": [-1, -2]}, r"several layers \(\[-1, -2\]\) do not fit"),
    ],
)
def test_twists_are_refused(change: dict[str, Any], what: str) -> None:
    config = tiny_mistral3.config()
    Mistral3.check(config)
    for name, value in change.items():
        object.__setattr__(config, name, value)
    with pytest.raises(UnsupportedModelError, match=what):
        Mistral3.check(config)


def test_a_selection_that_drops_a_patch_of_pixtral_is_refused() -> None:
    config = pixtral().config
    Llava.check(config)
    config.vision_feature_select_strategy = "default"
    with pytest.raises(UnsupportedModelError, match="'default' drops the first patch"):
        Llava.check(config)


def test_settings_limit_the_size() -> None:
    own = Mistral3.settings(tiny_mistral3.config(), tiny_mistral3.processor(), (84, 112))
    assert (own["size"], own["patch_size"], own["merge_size"]) == ({"height": 84, "width": 112}, 14, 2)
    own = Llava.settings(pixtral().config, tiny_mistral3.processor())
    assert (own["size"], own["patch_size"], own["merge_size"]) == ({"longest_edge": 112}, 14, 1)
