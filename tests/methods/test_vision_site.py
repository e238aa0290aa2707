"""Cuts inside the vision encoder: what they keep, what becomes of it, and what is refused; the oracle is transformers' encoder."""

from __future__ import annotations

import shutil
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from altered import change_weight, first_failure, sealed
from device_simulation import SimulatedDriver
from masked_encoder import MaskedEncoder, inputs_of
from PIL import Image
from simulated_device import on_device, prepare

from edgeprune.bundle import DECODER, SELECTOR, VISION, VISION_UNPRUNED, Bundle
from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.errors import BundleError, EngineError, PlanError
from edgeprune.export.exporter import export_bundle
from edgeprune.export.verification import verify
from edgeprune.families.encoder_pruning import RowLayout, SurvivingTokens
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.processors import image_spec
from edgeprune.registry import FAMILIES, family_class, method_class
from edgeprune.runtime import Runtime, load
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits, shape_profiles

NAMES = tuple(name for name in sorted(FAMILIES) if not family_class(name).no_encoder_cuts_reason)
PROMPT = "What colour is the cube?"
families = pytest.mark.parametrize("name", NAMES)
# transformers pads views of different sizes, which the oracle does not follow: tests/families/test_family_lfm2_vl.py.
of_equal_views = pytest.mark.parametrize("name", [name for name in NAMES if name != "lfm2_vl"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a family's name to its tiny model."""

    @cache
    def loaded(name: str) -> LoadedModel:
        return load_model(resolve_model(str(import_module(f"tiny_{name}").folder(tmp_path_factory.mktemp(name)))))

    return loaded


@pytest.fixture
def model(name: str, models: Any) -> LoadedModel:
    found: LoadedModel = models(name)
    return found


def picture(loaded: LoadedModel, seed: int = 0) -> Image.Image:
    size = import_module(f"tiny_{loaded.folder.model_type}").SIZE
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def geometry_of(loaded: LoadedModel) -> Geometry:
    return loaded.geometry(import_module(f"tiny_{loaded.folder.model_type}").SIZE)


def whole(loaded: LoadedModel) -> KeepPlan:
    return unpruned_plan(loaded.folder.model_type, len(loaded.family.decoder().layers), geometry_of(loaded))


def evit(geometry: Geometry, share: float, layer: int = 1, method: str = "evit") -> Cut:
    """Return a cut that keeps a share of every view."""
    views = len(geometry.layout)
    return Cut("vision", method, views * max(1, int(share * (geometry.tokens // views))), layer)


@torch.no_grad()
def run(loaded: LoadedModel, geometry: Geometry, shown: list[Image.Image], *cuts: Cut, signals: bool = False) -> list[torch.Tensor]:
    """Return what the family's encoder returns, of the tokens [V, width] and planes side by side."""
    patches = torch.from_numpy(image_spec(loaded.settings(geometry)).patches(shown))
    seen = loaded.family.vision(geometry, signals=signals, cuts=cuts)(patches)
    visual, *others = seen if isinstance(seen, tuple) else (seen,)
    return [visual[0], *others]


def ranked(received: np.ndarray, left: np.ndarray, keep: int, views: int) -> np.ndarray:
    """Return the indices [keep] of the best of the tokens that are left, as many of each view."""
    each = len(received) // views
    parts = [left[left // each == view] for view in range(views)]
    return np.concatenate([np.sort(part[np.argsort(-received[part], kind="stable")[: keep // views]]) for part in parts])


def apart(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


@of_equal_views
def test_dropping_nothing_changes_nothing(name: str, model: LoadedModel) -> None:
    geometry, shown = geometry_of(model), [picture(model)]
    visual, kept = run(model, geometry, shown, evit(geometry, 1.0))
    assert torch.equal(visual, run(model, geometry, shown)[0])
    assert kept.tolist() == list(range(geometry.tokens))


@of_equal_views
@pytest.mark.parametrize("steps", [((1, 0.5),), ((2, 0.5),), ((1, 0.8), (2, 0.4))], ids=["first", "second", "staircase"])
def test_the_encoder_goes_on_as_if_the_others_were_hidden(
    name: str, model: LoadedModel, steps: tuple[tuple[int, float], ...]
) -> None:
    geometry, shown = geometry_of(model), picture(model)
    cuts = [evit(geometry, share, layer) for layer, share in steps]
    oracle, given, expected = MaskedEncoder(model, geometry), inputs_of(model, shown), dict[int, np.ndarray]()
    for cut in cuts:
        oracle.run(given, expected)
        left = expected[max(expected)] if expected else np.arange(geometry.tokens)
        expected[cut.layer] = ranked(oracle.received[cut.layer - 1], left, cut.keep, len(geometry.layout))
    visual, *kept = run(model, geometry, [shown], *cuts)
    assert [part.tolist() for part in kept] == [part.tolist() for part in expected.values()]
    reference = oracle.run(given, expected)
    assert apart(visual, reference[kept[-1]]) < 1e-5
    assert apart(visual, oracle.run(given)[kept[-1]]) > 1e-4  # the others had a say before


def test_windows_of_other_tokens_would_be_noticed(models: Any) -> None:
    model = models("qwen2_5_vl")
    geometry, shown = geometry_of(model), picture(model)
    tower: Any = model.family.vision(geometry, cuts=[evit(geometry, 0.5)])
    patches = torch.from_numpy(image_spec(model.settings(geometry)).patches([shown]))
    with torch.no_grad():
        visual, kept = tower(patches)
        tower.window = tower.window.roll(1)
        other, _ = tower(patches)
    expected = MaskedEncoder(model, geometry).run(inputs_of(model, shown), {1: kept.numpy()})[kept]
    assert apart(visual[0], expected) < 1e-5 and apart(other[0], expected) > 1e-3


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_every_frame_of_a_video_keeps_as_many(name: str, model: LoadedModel) -> None:
    geometry = model.geometry(import_module(f"tiny_{name}").SIZE, 4, 2.0)
    shown = [picture(model, seed) for seed in range(4)]
    cut, oracle = evit(geometry, 0.5), MaskedEncoder(model, geometry)
    patches = torch.from_numpy(image_spec(model.settings(geometry)).patches(shown))
    given = {"pixel_values": patches, "image_grid_thw": torch.tensor([[2, geometry.rows * 2, geometry.columns * 2]])}
    oracle.run(given)
    expected = ranked(oracle.received[0], np.arange(geometry.tokens), cut.keep, 2)
    visual, kept = run(model, geometry, shown, cut)
    assert kept.tolist() == expected.tolist()
    assert apart(visual, oracle.run(given, {1: expected})[kept]) < 1e-5


@families
def test_the_signals_are_of_the_tokens_that_stay(name: str, model: LoadedModel) -> None:
    geometry, shown = geometry_of(model), [picture(model)]
    plain = run(model, geometry, shown, signals=True)
    for layer in (1, 2):
        _, *signals, kept = run(model, geometry, shown, evit(geometry, 0.5, layer), signals=True)
        assert [len(signal) for signal in signals] == [len(kept)] * (3 if model.family.projects_tokens else 2)
        if layer == 2 and name in ("idefics3", "internvl", "qwen2_5_vl", "qwen2_vl", "smolvlm"):  # after the block that tells them
            assert all(torch.equal(signal, part[kept]) for signal, part in zip(signals[:2], plain[1:3], strict=True))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "llava"])
@pytest.mark.parametrize("method", ["random", "uniform"])
def test_the_baselines_keep_the_places_that_they_say(name: str, method: str, model: LoadedModel) -> None:
    geometry = geometry_of(model)
    cut = evit(geometry, 0.5, method=method)
    _, kept = run(model, geometry, [picture(model)], cut)
    scores = method_class(method)(cut, geometry)._scores.numpy()
    assert kept.tolist() == ranked(scores, np.arange(geometry.tokens), cut.keep, len(geometry.layout)).tolist()


def test_evit_by_hand() -> None:
    # Two views of a class token and two tokens of two patches each; the class token's row, of one head.
    row = torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1], [0.2, 0.1, 0.1, 0.3, 0.3]])
    received = RowLayout(2, 1, 2).received(row[:, None, None].expand(-1, 1, 5, -1))
    assert received.tolist() == pytest.approx([0.3, 0.15, 0.1, 0.3])
    method = method_class("evit")(Cut("vision", "evit", 2, 1), Geometry(28, 28, 14, 1))
    assert torch.equal(method.score(SurvivingTokens(torch.arange(4), lambda: received)), received)


@families
def test_a_cut_beyond_the_encoder_is_refused(name: str, model: LoadedModel) -> None:
    plan = whole(model).with_cuts(evit(geometry_of(model), 0.5, layer=40))
    with pytest.raises(PlanError, match="beyond the vision encoder's") as refused:
        model.check_plan(plan)
    assert "Give 1 to" in str(refused.value.hint)


def test_views_must_share_alike(models: Any) -> None:
    model = models("internvl")
    plan = whole(model)
    with pytest.raises(PlanError, match="do not divide among 3 views"):
        model.check_plan(plan.with_cuts(Cut("vision", "evit", 7, 1)))


def test_a_family_that_cannot_says_why(tmp_path: Path) -> None:
    model = load_model(resolve_model(str(import_module("tiny_idefics2").folder(tmp_path))))
    with pytest.raises(PlanError, match="evit cannot act at site 'vision'") as refused:
        model.check_plan(whole(model).with_cuts(Cut("vision", "evit", 2, 1)))
    assert "resampler" in str(refused.value.hint)


def test_frames_are_compared_whole_or_not_at_all(models: Any) -> None:
    model = models("qwen2_vl")
    base = unpruned_plan("qwen2_vl", 2, model.geometry((84, 140), 4, 2.0))
    with pytest.raises(PlanError, match="compares the same places of whole frames"):
        model.check_plan(base.with_cuts(Cut("vision", "random", 28, 1), Cut("input", "evs", 20)))


@pytest.mark.parametrize("method", ["uniform", "visionzip", "divprune"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_later_cuts_name_places_in_the_image(name: str, method: str, model: LoadedModel) -> None:
    base, geometry = whole(model), geometry_of(model)
    first = evit(geometry, 0.7)
    plan = base.with_cuts(first, Cut("input", method, first.keep - 2), Cut("layer", "fastv", first.keep - 3, 1))
    answer = Runtime(reference_model(model, plan)).generate(picture(model), PROMPT, max_tokens=3)
    parts = [set(cut.kept.tolist()) for cut in answer.receipt.cuts]
    assert [(cut.before, cut.after) for cut in answer.receipt.cuts] == [
        (geometry.tokens, first.keep),
        (first.keep, first.keep - 2),
        (first.keep - 2, first.keep - 3),
    ]
    assert parts[0] > parts[1] > parts[2] and max(parts[0]) >= first.keep
    if method == "uniform":
        scores, left = method_class("uniform")(plan.cuts[1], geometry)._scores, sorted(parts[0])
        assert parts[1] == set(np.array(left)[np.argsort(-scores.numpy()[left])[: first.keep - 2]].tolist())


@pytest.fixture(scope="module")
def staircase(models: Any) -> KeepPlan:
    """Return a plan with two cuts in the encoder and one at every later site, of a tower with windows."""
    base = whole(models("qwen2_5_vl"))  # 15 visual tokens
    cuts = [Cut("vision", "evit", 12, 1), Cut("vision", "uniform", 10, 2), Cut("input", "uniform", 8)]
    return base.with_cuts(*cuts, Cut("layer", "fastv", 6, 1), Cut("cache", "plphp", 3, 1))


@pytest.fixture(scope="module")
def bundle(models: Any, staircase: KeepPlan, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(models("qwen2_5_vl"), staircase, tmp_path_factory.mktemp("vision") / "bundle")


@pytest.mark.slow
def test_the_bundle_keeps_what_the_reference_keeps(models: Any, bundle: Bundle) -> None:
    model = models("qwen2_5_vl")
    assert [stage.name for stage in verify(bundle, model) if not stage.passed] == []
    chats = [Runtime(reference_model(model, bundle.plan)).chat(), load(bundle.path).chat()]
    for seed in (0, 1, None):
        shown = None if seed is None else picture(model, seed)
        streams = [chat.ask(PROMPT, shown, max_tokens=4) for chat in chats]
        assert len({"".join(stream) for stream in streams}) == 1
        for one, other in zip(*(stream.receipt.cuts for stream in streams), strict=True):
            assert np.array_equal(np.sort(one.kept), np.sort(other.kept)) and (one.before, one.after) == (other.before, other.after)


def test_the_graphs_name_their_cuts_by_the_plan(bundle: Bundle) -> None:
    named = {
        graph: [name for name in record.outputs if name.startswith("kept")] for graph, record in bundle.manifest.graphs.items()
    }
    assert named[VISION] == ["kept.0", "kept.1"] and named[VISION_UNPRUNED] == []
    assert named[SELECTOR] == ["kept_embeds", "kept.2"] and named[DECODER] == ["kept.3", "kept.4"]
    assert bundle.manifest.graphs[VISION].outputs["visual_embeds"].shape == (1, 10, 48)


def test_the_picture_shows_every_cut(models: Any, bundle: Bundle) -> None:
    runtime, shown = load(bundle.path), picture(models("qwen2_5_vl"))
    panels = runtime.panels(shown, runtime.generate(shown, PROMPT, max_tokens=2).receipt)
    assert [panel.title for panel in panels[1:]] == [*map(str, bundle.plan.cuts[:4]), "KV caches"]


def test_unpruned_answers_open_the_whole_encoder_then_alone(models: Any, bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    assert f"{VISION_UNPRUNED}.data" not in bundle.manifest.files  # its weights are the other one's
    model, runtime = models("qwen2_5_vl"), load(copy)
    shown = picture(model)
    plain = Runtime(reference_model(model, whole(model))).generate(shown, PROMPT, max_tokens=6)
    answer = runtime.generate(shown, PROMPT, max_tokens=6, prune=False)
    assert answer.text == plain.text and answer.receipt.visual_kv_share == 1.0
    runtime = load(copy)
    (copy / VISION_UNPRUNED).unlink()
    assert runtime.generate(shown, PROMPT, max_tokens=2).receipt.pruned
    with pytest.raises(BundleError, match="vision_unpruned"):
        runtime.generate(shown, PROMPT, max_tokens=2, prune=False)


def test_engines_for_pruned_answers_leave_the_whole_encoder_out(bundle: Bundle) -> None:
    assert VISION_UNPRUNED not in shape_profiles(bundle, ProfileLimits())
    assert VISION_UNPRUNED in shape_profiles(bundle, ProfileLimits(unpruned=True))
    prepare(bundle, ProfileLimits(context=512, turn=256))
    runtime, shown = on_device(bundle, SimulatedDriver()), Image.new("RGB", (140, 84))
    assert runtime.generate(shown, PROMPT, max_tokens=2).receipt.pruned
    with pytest.raises(EngineError, match="without its cuts"):
        runtime.generate(shown, PROMPT, max_tokens=2, prune=False)


@pytest.mark.parametrize(("weight", "stage"), [("blocks.0.attn.qkv.weight", "vision kept"), ("merger.mlp.2.bias", "vision")])
def test_a_broken_encoder_is_named(weight: str, stage: str, models: Any, bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    change_weight(copy, VISION, weight, 0.9)
    assert first_failure(verify(sealed(copy), models("qwen2_5_vl"))) == stage
