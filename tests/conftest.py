"""Fixtures of all tests: a tiny random model, and bundles exported once. Nothing here imports torch before a test asks for it."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from tiny_models import TINY_GEOMETRY, model_folder, qwen2_vl_config

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test asks the internet

from edgeprune.bundle import Bundle
from edgeprune.plan import KeepPlan
from edgeprune.plan.presets import staircase_plan, unpruned_plan

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from edgeprune.checkpoint.loading import LoadedModel


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="Run also what takes long: slow, size and nightly.")
    parser.addoption("--questions", type=int, default=200, help="Of each bundle of test_soak_conversations.py.")
    parser.addoption("--precision", default="fp32", help="Of the bundles of test_true_size.py.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes or gigabytes, unless it is asked for with `--all` or by its mark."""
    left_out = {mark for mark in ("slow", "size", "nightly") if mark not in config.getoption("-m")}
    if config.getoption("--all"):
        return
    left = [item for item in items if left_out & set(item.keywords)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_collection_finish() -> None:
    """Let the garbage collector look at what tests make alone: torch and transformers are half a million objects that stay."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(scope="session")
def kept_traces() -> Iterator[None]:
    """Read what was traced before from the disk: see `trace_cache`."""
    import trace_cache

    place = trace_cache.folder()
    with nullcontext() if place is None else trace_cache.kept_traces(place):
        yield


@pytest.fixture
def fresh_traces(kept_traces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace everything anew: for tests that break the code on purpose, which the key of a trace cannot know."""
    import trace_cache

    from edgeprune.export import tracing

    monkeypatch.setattr(tracing, "traced", trace_cache.FRESH)


@pytest.fixture(scope="session", autouse=True)
def _kept_traces(request: pytest.FixtureRequest) -> None:
    if "torch" in sys.modules:  # some test may trace; pure tests run without torch
        request.getfixturevalue("kept_traces")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Qwen2-VL folder of random weights: 3 layers, 6 heads on 2 KV heads of 8, 14-pixel patches merged 2 x 2."""
    from transformers import Qwen2VLForConditionalGeneration

    return model_folder(tmp_path_factory.mktemp("tiny-qwen2-vl"), Qwen2VLForConditionalGeneration, qwen2_vl_config({}))


@pytest.fixture(scope="session")
def even(tmp_path_factory: pytest.TempPathFactory, kept_traces: None) -> LoadedModel:
    """Return a model whose sizes suit every kernel: 2 layers, 4 heads on 2 KV heads of 32, matrices of whole int4 blocks."""
    from transformers import Qwen2VLForConditionalGeneration

    from edgeprune.checkpoint.loading import load_model, resolve_model

    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = qwen2_vl_config({**sizes, "rope_parameters": rope})
    folder = model_folder(tmp_path_factory.mktemp("even-qwen2-vl"), Qwen2VLForConditionalGeneration, config)
    return load_model(resolve_model(str(folder)))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path, kept_traces: None) -> LoadedModel:
    """Return the tiny model, loaded."""
    from edgeprune.checkpoint.loading import load_model, resolve_model

    return load_model(resolve_model(str(tiny_folder)))


@pytest.fixture(scope="session")
def tiny_plan() -> KeepPlan:
    """Return a staircase that drops half the tokens by attention, then all but a quarter by lot."""
    base = unpruned_plan("qwen2_vl", 3, TINY_GEOMETRY)
    by_attention = staircase_plan(base, "fastv", [0.5], [1])
    by_lot = staircase_plan(base, "random", [0.25], [2], seed=3)
    return KeepPlan(base.family, base.layers, base.geometry, by_attention.cuts + by_lot.cuts)


@pytest.fixture(scope="session")
def tiny_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a bundle of the tiny model under the staircase.

    EDGEPRUNE_TINY_BUNDLE names a folder that keeps it: `make test-arm` makes it on x86, and has no torch where it is read.
    """
    named = os.environ.get("EDGEPRUNE_TINY_BUNDLE")
    folder = Path(named) if named else tmp_path_factory.mktemp("bundles") / "tiny"
    if named and folder.is_dir():
        return Bundle.load(folder)
    from edgeprune.export.exporter import export_bundle

    return export_bundle(request.getfixturevalue("tiny"), request.getfixturevalue("tiny_plan"), folder)


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Yield a browser that is installed on this machine, with a made-up camera; skip where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no browser is installed: neither Chromium nor Chrome")
    camera = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")
    with playwright.sync_playwright() as each:
        opened = each.chromium.launch(executable_path=found, args=["--no-sandbox", *camera])
        yield opened
        opened.close()
