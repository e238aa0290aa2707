"""Tiers on engines: a profile for each, which lint and NVIDIA's builder take; a simulated device says what ONNX Runtime says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from device_simulation import SimulatedDriver
from PIL import Image
from simulated_device import LIMITS, on_device, prepare
from tiny_models import TINY_GEOMETRY

from edgeprune.bundle import DECODER, Bundle
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.export.exporter import export_bundle
from edgeprune.export.tracing import trace_decoder
from edgeprune.lint.check import lint_bundle
from edgeprune.plan import Cut
from edgeprune.plan.presets import unpruned_plan
from edgeprune.plan.tiers import Tiers
from edgeprune.runtime import load
from edgeprune.runtime.backends.tensorrt.profiles import (
    IMAGE_PREFILL,
    STEP,
    TEXT,
    decoder_ranges,
    image_prefill_of,
    shape_profiles,
    shapes_of,
)
from edgeprune.runtime.backends.tensorrt.trial import substitute_capability, try_build
from edgeprune.targets import TARGETS, Lowering

PROMPT = "What colour is the cube?"
KEPT = {"quality": (10, 8, 7), "balanced": (9, 6, 3), "fast": (8, 4, 2)}


@pytest.fixture(scope="module")
def tiered(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    base = unpruned_plan("qwen2_vl", 3, tiny.geometry((84, 112)))
    plans = {
        name: replace(
            base, cuts=(Cut("input", "divprune", entered), Cut("layer", "fastv", layer, 1), Cut("cache", "plphp", held, 2))
        )
        for name, (entered, layer, held) in KEPT.items()
    }
    lowering = Lowering(TARGETS["jetpack6"], "fp32")
    bundle = export_bundle(tiny, Tiers(plans), tmp_path_factory.mktemp("tiers") / "bundle", lowering=lowering)
    prepare(bundle)
    return bundle


@pytest.mark.parametrize("name", list(KEPT))
def test_the_device_says_what_onnx_runtime_says(name: str, tiered: Bundle, tiny_image: Image.Image) -> None:
    expected = load(tiered.path).generate(tiny_image, PROMPT, tier=name, max_tokens=6)
    actual = on_device(tiered, SimulatedDriver()).generate(tiny_image, PROMPT, tier=name, max_tokens=6)
    assert actual.text == expected.text
    assert [len(cut.kept.T) for cut in actual.receipt.cuts] == list(KEPT[name])
    for cut, same in zip(expected.receipt.cuts, actual.receipt.cuts, strict=True):
        assert np.array_equal(cut.kept, same.kept)
    assert actual.receipt.kv_bytes == expected.receipt.kv_bytes


def test_an_image_is_recalled_on_the_device_too(tiered: Bundle, tiny_image: Image.Image) -> None:
    runtime = on_device(tiered, SimulatedDriver())
    first = runtime.generate(tiny_image, PROMPT, max_tokens=4)
    again = runtime.generate(tiny_image, PROMPT, max_tokens=4)
    assert (first.receipt.reused, again.receipt.reused) == ((), ("vision", "input cut"))
    assert again.text == first.text


def test_each_tier_has_a_profile_of_constants(tiered: Bundle) -> None:
    decoder = shape_profiles(tiered, LIMITS)[DECODER]
    assert len(decoder) == 5
    assert [image_prefill_of(tier) for tier in range(3)] == [IMAGE_PREFILL, 2, 3]
    for tier, name in enumerate(KEPT):
        profile = decoder[image_prefill_of(tier)]
        assert profile["tier"] == ((tier + 1,),) * 3
        assert {shape[1] for shape in profile["visual_embeds"]} == {KEPT[name][0]}
    assert decoder[TEXT]["tier"] == decoder[STEP]["tier"] == ((1,),) * 3
    assert decoder[STEP]["suffix_embeds"] == ((1, 1, 48),) * 3


def test_the_lint_finds_no_error(tiered: Bundle) -> None:
    given = {graph: [profile for profile in profiles if profile] for graph, profiles in shape_profiles(tiered, LIMITS).items()}
    assert not [finding for finding in lint_bundle(tiered, TARGETS["jetpack6"], given) if finding.severity == "error"]


@pytest.mark.parametrize("target", ["jetpack6", "jetpack7.2"])
@pytest.mark.slow
def test_nvidias_builder_takes_a_decoder_with_tiers(target: str, even: LoadedModel, tmp_path: Path) -> None:
    lowering = Lowering(TARGETS[target], "fp16")
    base = unpruned_plan("qwen2_vl", 2, TINY_GEOMETRY)
    plans = [
        replace(base, cuts=(Cut("layer", "fastv", layer, 1), Cut("cache", "plphp", held, 1))) for layer, held in ((8, 7), (4, 2))
    ]
    path = tmp_path / "decoder.onnx"
    record = trace_decoder(even.family.decoder(), 3, plans[0], lowering, path, plans[1:])
    dynamic = {name: at.shape for name, at in record.inputs.items() if any(isinstance(axis, str) for axis in at.shape)}
    wanted = decoder_ranges(plans, LIMITS, steps=True)
    profiles = [{name: shapes_of(shape, ranges) for name, shape in dynamic.items()} for ranges in wanted]
    trial = try_build(path, DECODER, profiles, substitute_capability(lowering.target))
    assert not trial.error
    assert trial.plan_bytes > 0
