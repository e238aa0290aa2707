"""ViP-LLaVA against transformers: visual tokens of several layers, signals, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_vipllava
import torch
from test_family_encoder import error
from test_family_llava import random
from tiny_folders import cut
from transformers import VipLlavaForConditionalGeneration

from edgeprune.checkpoint.loading import load_model, resolve_model
from edgeprune.errors import UnsupportedModelError
from edgeprune.families.llava import VipLlava
from edgeprune.plan import Geometry

SQUARE = Geometry(70, 70, 14, 1)


def vipllava(**changes: Any) -> Any:
    return random(VipLlavaForConditionalGeneration, tiny_vipllava.config(**changes))


def expected(model: Any, pixels: torch.Tensor) -> Any:
    return model.get_image_features(pixels).pooler_output[0]


@pytest.mark.parametrize("side", [70, 42, 98])
@pytest.mark.parametrize("layers", [[-2, -4, 2], [-1, 0], [3], [1, 1, -3]])
def test_a_view_is_encoded_as_in_transformers(side: int, layers: list[int]) -> None:
    model, pixels = vipllava(side=side, vision_feature_layers=layers), torch.randn(1, 3, side, side)
    family, geometry, patches = VipLlava(model), Geometry(side, side, 14, 1), (side // 14) ** 2
    with torch.no_grad():
        tower: Any = family.vision(geometry)
        assert error(tower(cut(pixels, 14))[0], expected(model, pixels)) < 1e-5 and tower.takes == (patches, 588)
        tower: Any = family.vision(geometry, signals=True)
        visual, received, keys, features = tower(cut(pixels, 14))
        assert error(tower.projector(features), visual[0]) < 1e-6
        assert error(visual[0], expected(model, pixels)) < 1e-5
    assert received.shape == (patches,) and keys.shape == (patches, 8) and received.gt(0).all()


@pytest.mark.parametrize("layers", [[-4, -2, 2], [-2, -4, 1]])
def test_another_order_or_layer_would_be_noticed(layers: list[int]) -> None:
    model, pixels = vipllava(), torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        before = expected(model, pixels)
        model.config.vision_feature_layer = layers
        assert error(VipLlava(model).vision(SQUARE)(cut(pixels, 14))[0], before) > 1e-2


def test_a_forgotten_norm_would_be_noticed() -> None:
    model, pixels = vipllava(), torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        before = expected(model, pixels)
        model.model.multi_modal_projector.projector_layernorm = torch.nn.Identity()
        assert error(VipLlava(model).vision(SQUARE)(cut(pixels, 14))[0], before) > 1e-2


def test_matrices_act_on_rows() -> None:
    tower: Any = VipLlava(vipllava()).vision(SQUARE, signals=True)
    program = torch.export.export(tower, (torch.randn(tower.takes),))
    shapes = [tuple(node.meta["val"].shape) for node in program.graph.output_node().args[0]]
    linear = [node for node in program.graph.nodes if node.target == torch.ops.aten.linear.default]
    assert shapes == [(1, 25, 48), (25,), (25, 8), (25, 72)]
    assert linear and all(node.args[0].meta["val"].dim() == 2 for node in linear)
    assert not any(word in str(node.target) for node in program.graph.nodes for word in ("conv", "upsample", "nonzero"))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"text_config": SimpleNamespace(model_type="phi")}, "'phi' is not supported behind 'vipllava'"),
        ({"vision_config": SimpleNamespace(model_type="siglip_vision_model")}, "'siglip_vision_model'"),
        ({"vision_feature_layer": -2}, "a single layer of vision features, -2"),
    ],
)
def test_twists_are_refused(change: dict[str, Any], what: str) -> None:
    config = tiny_vipllava.config()
    VipLlava.check(config)
    for name, value in change.items():
        object.__setattr__(config, name, value)
    with pytest.raises(UnsupportedModelError, match=what):
        VipLlava.check(config)


def test_the_config_of_the_7b_is_refused_until_it_names_its_layers(tmp_path: Path) -> None:
    path = tiny_vipllava.folder(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    layers = config.pop("vision_feature_layer")
    path.write_text(json.dumps(config | {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}))
    with pytest.raises(UnsupportedModelError, match="single layer") as refused:
        load_model(resolve_model(str(tmp_path)))
    assert "vision_feature_layers" in str(refused.value.hint)
    path.write_text(json.dumps(config | {"vision_feature_layers": layers}))
    assert load_model(resolve_model(str(tmp_path))).model.config.vision_feature_layer == [-2, -4, 2]


def test_an_image_processor_of_another_size_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"4 x 4 patches, but its vision encoder takes 5 x 5"):
        VipLlava(vipllava()).vision(Geometry(56, 56, 14, 1))
