"""A tiny random model with awkward sizes, and bundles exported once for all tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trace_cache import folder, kept_traces
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from edgeprune.bundle import Bundle
from edgeprune.calibration.planning import staircase_plan, unpruned_plan
from edgeprune.export.exporter import export_bundle
from edgeprune.loading import LoadedModel, find_model, load_model
from edgeprune.plan import Geometry, KeepPlan
from edgeprune.tabletop import MODEL_FOLDER

TINY_GEOMETRY = Geometry(height=84, width=112, patch=14, merge=2)  # 3 x 4 visual tokens


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--precision", default="fp32", help="Of the bundles of test_true_size.py.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes and gigabytes, unless it is asked for with `-m size` or `-m nightly`."""
    unasked = {mark for mark in ("size", "nightly") if mark not in config.getoption("-m")}
    left = [item for item in items if unasked & set(item.keywords)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session", autouse=True)
def _kept_traces() -> Iterator[None]:
    place = folder()
    with nullcontext() if place is None else kept_traces(place):
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Qwen2-VL folder of random weights: 3 layers, 6 heads on 2 KV heads of 8, 14-pixel patches merged 2 x 2."""
    return model_folder(tmp_path_factory.mktemp("tiny-qwen2-vl"), Qwen2VLForConditionalGeneration, _config({}))


@pytest.fixture(scope="session")
def even(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Return a model whose sizes suit every kernel: 2 layers, 4 heads on 2 KV heads of 32, matrices of whole int4 blocks."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = _config({**sizes, "rope_parameters": rope})
    return load_model(
        find_model(str(model_folder(tmp_path_factory.mktemp("even-qwen2-vl"), Qwen2VLForConditionalGeneration, config)))
    )


def model_folder(folder: Path, kind: Any, config: Any, size: tuple[int, int] = (84, 112)) -> Path:
    """Write a model of random weights with the bundled tokenizer and a processor of 14-pixel patches; return the folder."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL_FOLDER / name, folder)
    processor = json.loads((MODEL_FOLDER / "preprocessor_config.json").read_text())
    processor |= {"patch_size": 14, "merge_size": 2, "size": {"shortest_edge": 784, "longest_edge": size[0] * size[1]}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)  # large enough that attention is not flat
    model.generation_config.eos_token_id = 2
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    return folder


def _config(sizes: dict[str, Any]) -> Any:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": sizes.get("hidden_size", 48), "num_heads": 2}
    return tiny_config(Qwen2VLConfig, vision, sizes)


def tiny_config(kind: Any, vision: dict[str, Any], sizes: dict[str, Any] | None = None) -> Any:
    """Return a configuration for the bundled tokenizer: 3 layers, 6 heads on 2 KV heads of 8, unless `sizes` says otherwise."""
    shipped = json.loads((MODEL_FOLDER / "config.json").read_text())
    text = {
        "vocab_size": shipped["text_config"]["vocab_size"],
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }
    vision = {"patch_size": 14, "spatial_merge_size": 2} | vision
    tokens = {name: value for name, value in shipped.items() if name.endswith("_token_id")}
    return kind(text_config=text | (sizes or {}), vision_config=vision, tie_word_embeddings=False, **tokens)


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedModel:
    """Return the tiny model, loaded."""
    return load_model(find_model(str(tiny_folder)))


@pytest.fixture(scope="session")
def tiny_plan() -> KeepPlan:
    """Return a staircase that drops half the tokens by attention, then all but a quarter by lot."""
    base = unpruned_plan("qwen2_vl", 3, TINY_GEOMETRY)
    by_attention = staircase_plan(base, "fastv", [0.5], [1])
    by_lot = staircase_plan(base, "random", [0.25], [2], seed=3)
    return KeepPlan(base.family, base.layers, base.geometry, by_attention.cuts + by_lot.cuts)


@pytest.fixture(scope="session")
def tiny_bundle(tiny: LoadedModel, tiny_plan: KeepPlan, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a bundle of the tiny model under the staircase."""
    return export_bundle(tiny, tiny_plan, tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def tiny_image() -> Image.Image:
    """Return a noisy picture of the tiny model's own size."""
    pixels = np.random.default_rng(5).integers(0, 256, (84, 112, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def altered_bundle(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """Return a private copy of the tiny bundle, to be broken by the test."""
    copy = tmp_path / "altered"
    shutil.copytree(tiny_bundle.path, copy)
    return copy
