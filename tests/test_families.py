"""Families beside Qwen2-VL: their vision towers and bundles against transformers' own models, on tiny random configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import model_folder, tiny_config
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from edgeprune.bundle import Bundle
from edgeprune.calibration.planning import unpruned_plan
from edgeprune.calibration.reference import reference_model
from edgeprune.export.exporter import export_bundle
from edgeprune.export.graphs import trace_vision
from edgeprune.export.verification import verify
from edgeprune.families.qwen2_5_vl import WindowedTower
from edgeprune.lint.check import lint
from edgeprune.loading import LoadedModel, find_model, load_model
from edgeprune.plan import Cut, Geometry
from edgeprune.runtime import Runtime
from edgeprune.runtime.tensorrt.trial import stand_in, try_build
from edgeprune.targets import TARGETS, Lowering

SIZE = (84, 140)  # 3 x 5 visual tokens in windows of 2 x 2: whole ones, and cut by the right edge, the bottom edge and the corner
GEOMETRY = Geometry(height=84, width=140, patch=14, merge=2)


WINDOWED = {
    "depth": 3,
    "hidden_size": 32,
    "out_hidden_size": 48,
    "intermediate_size": 40,
    "num_heads": 2,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Return a tiny Qwen2.5-VL."""
    folder = tmp_path_factory.mktemp("tiny-qwen2-5-vl")
    config = tiny_config(Qwen2_5_VLConfig, WINDOWED)
    return load_model(find_model(str(model_folder(folder, Qwen2_5_VLForConditionalGeneration, config, SIZE))))


def patches(loaded: LoadedModel, geometry: Geometry) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(geometry.tokens * geometry.merge**2, 3 * 2 * geometry.patch**2, generator=generator)


@pytest.mark.parametrize("size", [(84, 140), (56, 56), (28, 196), (140, 84)])
def test_windows_attend_as_transformers_does(windowed: LoadedModel, size: tuple[int, int]) -> None:
    geometry = Geometry(height=size[0], width=size[1], patch=14, merge=2)
    pixels = patches(windowed, geometry)
    grid = torch.tensor([[1, geometry.height // 14, geometry.width // 14]])
    with torch.no_grad():
        expected = windowed.model.model.visual(pixels, grid).pooler_output
        actual = windowed.family.vision(geometry)(pixels)[0]
    assert torch.allclose(actual, expected, atol=1e-5 * float(expected.abs().max()))


def test_wrong_windows_would_be_noticed(windowed: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, grid = patches(windowed, GEOMETRY), torch.tensor([[1, 6, 10]])
    with torch.no_grad():
        expected = windowed.model.model.visual(pixels, grid).pooler_output
        tower: Any = windowed.family.vision(GEOMETRY)
        monkeypatch.setattr(tower, "whole", frozenset(range(3)))
        actual = tower(pixels)[0]
    assert isinstance(tower, WindowedTower)
    assert float((actual - expected).abs().max()) > 1e-3 * float(expected.abs().max())  # a hundred times the tolerance


def test_the_signals_come_from_a_block_without_windows(windowed: LoadedModel) -> None:
    with torch.no_grad():
        visual, received, keys = windowed.family.vision(GEOMETRY, signals=True)(patches(windowed, GEOMETRY))
    assert visual.shape == (1, 15, 48) and received.shape == (15,) and keys.shape == (15, 32)
    assert float(received.sum()) == pytest.approx(15 / 60, rel=1e-4)  # patches of a token averaged: 60 patches share one


def test_the_reference_generates_what_transformers_generates(windowed: LoadedModel) -> None:
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    plan = unpruned_plan("qwen2_5_vl", 3, windowed.geometry(SIZE))
    model = reference_model(windowed, plan)
    answer = Runtime(model).generate(image, "What colour is the cube?", max_tokens=8)
    messages: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the cube?"}]}]
    text = model.template.render(messages, add_generation_prompt=True, **model.special_tokens)
    ids = [token for token in model.codec.encode(text) for _ in range(15 if token == model.image_token else 1)]
    pixels, _ = model.image_spec.patches(image)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        generated = windowed.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=(tokens == model.image_token).int(),
            pixel_values=torch.from_numpy(pixels),
            image_grid_thw=torch.tensor([[1, 6, 10]]),
            max_new_tokens=8,
            do_sample=False,
        )
    said = generated[0, len(ids) :].tolist()
    said = said[: said.index(2)] if 2 in said else said
    assert answer.text == model.codec.decode(said)


def test_a_pruned_bundle_is_verified(windowed: LoadedModel, tmp_path: Path) -> None:
    plan = unpruned_plan("qwen2_5_vl", 3, windowed.geometry(SIZE)).with_cuts(
        Cut("input", "visionzip", 12), Cut("layer", "fastv", 8, layer=1), Cut("cache", "plphp", 4, layer=2)
    )
    bundle: Bundle = export_bundle(windowed, plan, tmp_path / "bundle")
    assert [stage.name for stage in verify(bundle, windowed) if not stage.passed] == []
    assert bundle.manifest.source.family == "qwen2_5_vl"


@pytest.mark.parametrize("target", ["jetpack6", "jetpack7.2"])
def test_its_tower_is_built(windowed: LoadedModel, target: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    lowering = Lowering(TARGETS[target], "fp16")
    plan = unpruned_plan("qwen2_5_vl", 3, GEOMETRY).with_cuts(Cut("input", "visionzip", 12))
    trace_vision(windowed.family, plan, 3 * 2 * 14**2, lowering, tmp_path / "vision.onnx")
    assert [finding for finding in lint(tmp_path / "vision.onnx", lowering.target) if finding.severity == "error"] == []
    assert try_build(tmp_path / "vision.onnx", "vision", [{}], stand_in(lowering.target)).error == ""
