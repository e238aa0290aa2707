"""Several plans in one bundle: each answers as a bundle of its own would, and switching loads nothing."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from learned_weights import drawn_weights
from PIL import Image

from edgeprune.bundle import DECODER, MANIFEST, Bundle
from edgeprune.bundle.integrity import record_files
from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.cli import main
from edgeprune.errors import BundleError, PlanError, UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.export.verification import verify
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.plan.tiers import Tiers, cache_group
from edgeprune.runtime import Runtime, load
from edgeprune.runtime.backends.interface import CancellationToken, Cancelled, DecoderOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache
from edgeprune.runtime.generation.request import choose_tier

PROMPT = "What colour is the cube?"
NAMES = ("quality", "balanced", "fast")
COUNTS = {"quality": (10, 8, 7, 12), "balanced": (9, 6, 3, 5), "fast": (8, 4, 2, 2)}


def composed(base: KeepPlan, counts: tuple[int, ...]) -> KeepPlan:
    """Return a plan that cuts at the input, between layers and in caches."""
    entered, layer, first, last = counts
    return replace(
        base,
        cuts=(
            Cut("input", "divprune", entered),
            Cut("layer", "fastv", layer, 1),
            Cut("cache", "plphp", min(first + 1, entered), 0),
            Cut("cache", "plphp", min(first, layer), 1),
            Cut("cache", "plphp", min(last, layer), 2),
        ),
    )


@pytest.fixture(scope="module")
def base(tiny: LoadedModel) -> KeepPlan:
    return unpruned_plan("qwen2_vl", 3, tiny.geometry((84, 112)))


@pytest.fixture(scope="module")
def tiers(base: KeepPlan) -> Tiers:
    return Tiers({name: composed(base, COUNTS[name]) for name in NAMES})


@pytest.fixture(scope="module")
def tiered(tiny: LoadedModel, tiers: Tiers, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(tiny, tiers, tmp_path_factory.mktemp("tiers") / "bundle")


@pytest.mark.parametrize("name", NAMES)
def test_each_tier_is_verified_against_its_plan(name: str, tiered: Bundle, tiny: LoadedModel) -> None:
    stages = verify(tiered, tiny, tier=name)
    assert all(stage.passed for stage in stages), stages


@pytest.mark.parametrize("name", NAMES)
def test_each_tier_answers_as_the_eager_plan_does(
    name: str, tiered: Bundle, tiers: Tiers, tiny: LoadedModel, tiny_image: Image.Image
) -> None:
    answer = load(tiered.path).generate(tiny_image, PROMPT, tier=name, max_tokens=16)
    expected = Runtime(reference_model(tiny, tiers.plans[name])).generate(tiny_image, PROMPT, max_tokens=16)
    assert answer.text == expected.text
    for cut, other in zip(answer.receipt.cuts, expected.receipt.cuts, strict=True):
        assert (cut.cut, cut.before, cut.after) == (other.cut, other.before, other.after)
        assert np.array_equal(cut.kept, other.kept)
    assert answer.receipt.visual_stored == expected.receipt.visual_stored
    assert (answer.receipt.tier, answer.receipt.tier_reason) == (name, "asked for")


def test_another_tier_is_told_apart(tiered: Bundle, tiny: LoadedModel) -> None:
    # The comparison above fails where the budgets are another's.
    swapped = replace(tiered, plan=tiered.lower_tiers[0], lower_tiers=(tiered.plan, tiered.lower_tiers[1]))
    assert not all(stage.passed for stage in verify(swapped, tiny, tier="quality"))


def test_the_weights_are_there_once(tiered: Bundle, tiny_bundle: Bundle) -> None:
    more = tiered.manifest.files[f"{DECODER}.data"].bytes / tiny_bundle.manifest.files[f"{DECODER}.data"].bytes
    assert more < 1.01
    graph = onnx.load(str(tiered.file(DECODER)), load_external_data=False).graph
    assert [axis.dim_param for value in graph.input if value.name == "tier" for axis in value.type.tensor_type.shape.dim] == [
        "tier"
    ]


def test_tiers_change_from_turn_to_turn_in_one_conversation(tiered: Bundle, tiny_image: Image.Image) -> None:
    runtime = load(tiered.path)
    chat, stored = runtime.chat(), []
    for name in ("fast", "quality", "balanced"):
        stream = chat.ask(PROMPT, tiny_image, tier=name, max_tokens=2)
        "".join(stream)
        stored.append(stream.receipt.visual_stored)
    alone = [
        runtime.generate(tiny_image, PROMPT, tier=name, max_tokens=1).receipt.visual_stored
        for name in ("fast", "quality", "balanced")
    ]
    assert stored == alone
    assert stored[0] < stored[2] < stored[1]


def test_the_best_tier_is_the_default(tiered: Bundle, tiny_image: Image.Image) -> None:
    runtime = load(tiered.path)
    receipt = runtime.generate(tiny_image, PROMPT, max_tokens=2).receipt
    assert runtime.tiers == NAMES
    assert (receipt.tier, receipt.tier_reason) == ("quality", "default")
    assert runtime.generate(tiny_image, PROMPT, prune=False, max_tokens=2).receipt.tier is None


def test_when_time_is_short_a_smaller_budget_is_taken(tiered: Bundle, tiny_image: Image.Image) -> None:
    runtime = load(tiered.path)
    for tier, prefill in enumerate((9e5, 8e5, 10.0)):
        runtime._pipeline.state.latency.update(tier, prefill, 0.01, 1)
    receipt = runtime.generate(tiny_image, PROMPT, max_tokens=2, deadline_ms=600_000).receipt
    assert (receipt.tier, receipt.tier_reason, receipt.finish_reason) == ("fast", "deadline", "length")


def test_a_long_deadline_gets_the_best_tier_without_warming_up(tiered: Bundle, tiny_image: Image.Image) -> None:
    runtime = load(tiered.path)
    for _ in range(3):
        receipt = runtime.generate(tiny_image, PROMPT, max_tokens=2, deadline_ms=600_000).receipt
        assert (receipt.tier, receipt.tier_reason) == ("quality", "default")


def test_a_prefill_that_its_deadline_stops_is_not_tried_again_at_once(
    tiered: Bundle, tiny_image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = load(tiered.path, cache_bytes=0)
    backend = runtime._pipeline.backend
    forward = backend.forward

    def slow(tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        if len(tokens.visual_indices) and tokens.tier == 0 and cancellation is not None:
            while cancellation.reason is None:
                time.sleep(0.005)
            raise Cancelled
        return forward(tokens, cache, cancellation=cancellation)

    monkeypatch.setattr(backend, "forward", slow)
    for tier in (0, 1, 2):
        runtime._pipeline.state.latency.update(tier, 1.0, 0.01, 1)
    receipts = [runtime.generate(tiny_image, PROMPT, max_tokens=1, deadline_ms=400).receipt for _ in range(6)]
    assert [receipt.finish_reason for receipt in receipts] == ["deadline"] * 2 + ["length"] * 4  # the first may be an outlier


def test_when_memory_is_short_a_smaller_budget_is_taken(tiered: Bundle, tiny_image: Image.Image) -> None:
    runtime = load(tiered.path)
    least = runtime.generate(tiny_image, PROMPT, max_tokens=1, tier="balanced").receipt.kv_bytes
    receipt = runtime.generate(tiny_image, PROMPT, max_tokens=1, max_kv_bytes=least).receipt
    assert (receipt.tier, receipt.tier_reason, receipt.kv_bytes) == ("balanced", "max_kv_bytes", least)
    with pytest.raises(UsageError, match="max_kv_bytes"):  # what was asked for is not altered
        runtime.generate(tiny_image, PROMPT, max_kv_bytes=least, tier="quality")


def test_warming_up_measures_every_tier(tiered: Bundle) -> None:
    pace = load(tiered.path, warm_up=True)._pipeline.state.latency
    assert sorted(pace._prefill_ms) == [0, 1, 2]
    assert pace.token_ms > 0


def test_a_tier_that_is_not_there_is_refused(tiered: Bundle, tiny_image: Image.Image) -> None:
    with pytest.raises(UsageError, match=r"no tier 'best'.*quality, balanced, fast"):
        load(tiered.path).generate(tiny_image, PROMPT, tier="best")
    with pytest.raises(UsageError, match="Without pruning"):
        load(tiered.path).generate(tiny_image, PROMPT, tier="fast", prune=False)


def test_choosing() -> None:
    known = (100.0, 50.0, 20.0)
    assert choose_tier(known, None, (3, 2, 1), None) == (0, "default")
    assert choose_tier(known, 60.0, (3, 2, 1), None) == (1, "deadline")
    assert choose_tier(known, 1.0, (3, 2, 1), None) == (2, "deadline")
    assert choose_tier(known, None, (3, 2, 1), 2) == (1, "max_kv_bytes")
    assert choose_tier(known, 30.0, (3, 2, 1), 2) == (2, "deadline")


def test_a_plan_without_the_others_cuts_keeps_everything_there(base: KeepPlan) -> None:
    less = replace(base, cuts=(Cut("layer", "fastv", 6, 1), Cut("cache", "plphp", 2, 2)))
    tiers = Tiers.of({"quality": replace(base, cuts=(Cut("layer", "fastv", 8, 1),)), "fast": less})
    assert [cut.keep for cut in tiers.plans["quality"].cuts] == [8, 8]
    assert tiers.plans["fast"] == less


@pytest.mark.parametrize(
    ("better", "worse", "words"),
    [
        ((Cut("layer", "fastv", 6, 1),), (Cut("layer", "uniform", 3, 1),), "different cuts"),
        ((Cut("layer", "fastv", 3, 1),), (Cut("layer", "fastv", 6, 1),), "Name the best tier first"),
        ((Cut("input", "divprune", 6),), (), "different cuts"),
        ((Cut("vision", "evit", 8, 1),), (Cut("vision", "evit", 4, 1),), "inside the vision encoder"),
    ],
)
def test_plans_that_one_decoder_cannot_serve_are_refused(
    better: tuple[Cut, ...], worse: tuple[Cut, ...], words: str, base: KeepPlan
) -> None:
    with pytest.raises(PlanError, match=words):
        Tiers.of({"quality": replace(base, cuts=better), "fast": replace(base, cuts=worse)})


def test_each_tier_may_have_weights_that_were_learned_for_its_count(
    tiny: LoadedModel, base: KeepPlan, tiny_image: Image.Image, tmp_path: Path
) -> None:
    # The second chooses by the question, the first does not.
    weights = {
        "quality": drawn_weights(48, (8, 8), model=tiny.weights_sha256, seed=1),
        "fast": drawn_weights(48, (3, 3), model=tiny.weights_sha256, seed=2, question=0.5),
    }
    plans = {
        name: base.with_cuts(Cut("input", "learned", each, weights=weights[name]))
        for name, each in {"quality": 8, "fast": 3}.items()
    }
    bundle = export_bundle(tiny, Tiers(plans), tmp_path / "bundle")
    assert dict(Bundle.load(bundle.path).tiers) == plans
    with load(bundle.path, threads=1) as model:
        for question in (PROMPT, "And where?"):
            for name, plan in plans.items():
                eager = Runtime(reference_model(tiny, plan)).generate(tiny_image, question, max_tokens=2).receipt
                receipt = model.generate(tiny_image, question, tier=name, max_tokens=2).receipt
                assert receipt.cuts[0].kept.tolist() == eager.cuts[0].kept.tolist()
    ranked = [
        base.with_cuts(*(Cut("cache", "plphp", keep, layer, options={"rows": "learned"}, weights=each) for layer in range(3)))
        for keep, each in ((8, weights["quality"]), (3, weights["fast"]))
    ]
    with pytest.raises(PlanError, match="different cuts"):  # the decoder is one graph
        Tiers({"quality": ranked[0], "fast": ranked[1]})


@pytest.mark.parametrize("name", ["Fast", "", "../fast", "a" * 40])
def test_names_are_plain(name: str, base: KeepPlan) -> None:
    with pytest.raises(PlanError, match="no name of a tier"):
        Tiers({"quality": base, name: base})


def test_other_models_and_single_tiers_are_refused(base: KeepPlan) -> None:
    with pytest.raises(PlanError, match="different models"):
        Tiers({"quality": base, "fast": replace(base, layers=4)})
    with pytest.raises(PlanError, match="two plans"):
        Tiers({"quality": base})


def test_layers_share_a_stage_only_if_they_do_in_every_tier(base: KeepPlan) -> None:
    plans = [replace(base, cuts=(Cut("cache", "plphp", 4, 0), Cut("cache", "plphp", keep, 1))) for keep in (4, 2)]
    assert cache_group(plans[:1], 0) == cache_group(plans[:1], 1)
    assert cache_group(plans, 0) != cache_group(plans, 1)


@pytest.fixture
def altered(tiered: Bundle, tmp_path: Path) -> Callable[[Callable[[Path], None]], Path]:
    def alter(change: Callable[[Path], None]) -> Path:
        path = Path(shutil.copytree(tiered.path, tmp_path / "copy"))
        change(path)
        data = json.loads((path / MANIFEST).read_text())
        data["files"] = {name: asdict(record) for name, record in record_files(path, MANIFEST).items()}
        (path / MANIFEST).write_text(json.dumps(data))
        return path

    return alter


def test_a_bundle_with_a_tier_missing_is_refused(altered: Callable[[Callable[[Path], None]], Path]) -> None:
    with pytest.raises(BundleError, match=r"does not list tiers/fast\.json"):
        Bundle.load(altered(lambda path: (path / "tiers" / "fast.json").unlink()))


def test_a_bundle_with_a_foreign_tier_is_refused(altered: Callable[[Callable[[Path], None]], Path], base: KeepPlan) -> None:
    with pytest.raises(PlanError, match="different cuts"):
        Bundle.load(altered(lambda path: base.save(path / "tiers" / "fast.json")))


@pytest.mark.slow
def test_the_command_line_takes_tiers(tiny_folder: Path, tiers: Tiers, tiny_image: Image.Image, tmp_path: Path) -> None:
    runner, given = CliRunner(), []
    for name, plan in tiers.plans.items():
        plan.save(tmp_path / f"{name}.json")
        given += ["--tier", f"{name}={tmp_path / name}.json"]
    tiny_image.save(tmp_path / "image.png")
    bundle = str(tmp_path / "bundle")
    assert runner.invoke(main, ["export", str(tiny_folder), "-o", bundle, *given]).exit_code == 0
    asked = ["run", bundle, "--image", str(tmp_path / "image.png"), "--prompt", PROMPT, "--json", "--max-tokens", "2"]
    answer = runner.invoke(main, [*asked, "--tier", "balanced"])
    assert json.loads(answer.stdout)["receipt"]["tier"] == "balanced"
    late = runner.invoke(main, [*asked, "--deadline-ms", "0.001"])
    assert json.loads(late.stdout)["receipt"]["finish_reason"] == "deadline"
    assert "fast" in runner.invoke(main, ["inspect", bundle]).stdout
    wrong = runner.invoke(main, [*asked, "--tier", "best"])
    assert (wrong.exit_code, "no tier 'best'" in wrong.stderr) == (2, True)


@pytest.mark.parametrize("given", [["fast"], ["fast="], ["a=x.json", "a=y.json"]])
def test_a_tier_without_name_or_plan_is_refused(given: list[str], tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    options = [word for text in given for word in ("--tier", text)]
    result = CliRunner().invoke(main, ["export", str(tiny_folder), "-o", str(tmp_path / "b"), *options])
    assert result.exit_code == 2
    assert not (tmp_path / "b").exists()
