"""CLIP's and SigLIP's encoders against transformers: features of any layers, the signals, and matrices on rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_folders import cut
from tiny_llava import VISION
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from edgeprune.families.encoder import FeatureEncoder

TOWERS = {"clip": (CLIPVisionModel, CLIPVisionConfig), "siglip": (SiglipVisionModel, SiglipVisionConfig)}
kinds = pytest.mark.parametrize("kind", TOWERS)


def tower_of(kind: str) -> Any:
    """Return an encoder of random weights: 4 layers, 3 heads of 8, 5 x 5 patches."""
    torch.manual_seed(0)
    model, config = TOWERS[kind]
    tower = model(config(**VISION, patch_size=14)).eval()
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.15)
    tower.set_attn_implementation("eager")
    return tower


@kinds
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("layers", [-1, -2, 1, 0, [-2], [1, -3, -1]])
def test_features_equal_transformers(kind: str, views: int, layers: int | list[int]) -> None:
    tower, pixels = tower_of(kind), torch.randn(views, 3, 70, 70)
    encoder = FeatureEncoder(tower, views, layers)
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        features, signals = encoder(cut(pixels, 14))
    chosen = [states[layer][:, -25:] for layer in ([layers] if isinstance(layers, int) else layers)]
    assert encoder.takes == (views * 25, 3 * 14 * 14) and signals == ()
    assert error(features, torch.cat(chosen, dim=-1).flatten(0, 1)) < 1e-5


@kinds
@pytest.mark.parametrize(("layers", "asked"), [(-1, 2), (-2, 2), (-3, 1), ([-2, 1], 2)])
def test_the_signals_are_those_of_the_layer_before_the_features(kind: str, layers: int | list[int], asked: int) -> None:
    tower, pixels = tower_of(kind), torch.randn(2, 3, 70, 70)
    layer = tower.encoder.layers[asked]
    with torch.no_grad():
        seen = tower(pixels, output_hidden_states=True, output_attentions=True)
        _, (received, keys) = FeatureEncoder(tower, 2, layers, signals=True)(cut(pixels, 14))
        expected_keys = layer.self_attn.k_proj(layer.layer_norm1(seen.hidden_states[asked]))[:, -25:].flatten(0, 1)
        expected_keys = expected_keys.view(50, layer.self_attn.num_heads, -1).mean(dim=1)  # as VisionZip's authors compare them
    weights = seen.attentions[asked]
    expected = weights[:, :, 0, 1:].mean(dim=1) if kind == "clip" else weights.mean(dim=(1, 2))
    assert error(received, expected.flatten()) < 1e-5 and error(keys, expected_keys) < 1e-5


@pytest.mark.parametrize("name", ["pre_layrnorm.weight", "embeddings.class_embedding", "encoder.layers.2.mlp.fc2.bias"])
def test_another_weight_would_be_noticed(name: str) -> None:
    tower, pixels = tower_of("clip"), torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        tower.get_parameter(name).mul_(1.1)
        assert error(FeatureEncoder(tower, 1, -2)(cut(pixels, 14))[0], states[-2][0, 1:]) > 1e-4


@kinds
def test_matrices_act_on_rows_and_unused_layers_are_left_out(kind: str) -> None:
    encoder, shapes = FeatureEncoder(tower_of(kind), 2, -3, signals=True), []
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, given, made: shapes.append(given[0].dim()))
    encoder(torch.randn(encoder.takes))
    assert set(shapes) == {2} and len(shapes) == 1 + 6 * 2


@kinds
def test_shapes_are_constant_when_traced(kind: str) -> None:
    encoder = FeatureEncoder(tower_of(kind), 2, [-2, -1], signals=True)
    program = torch.export.export(encoder, (torch.randn(encoder.takes),))
    assert [tuple(node.meta["val"].shape) for node in program.graph.output_node().args[0]] == [(50, 48), (50,), (50, 8)]
    assert not any("conv" in str(node.target) for node in program.graph.nodes)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, of the largest value."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())
