"""The outputs that an export stores for a device: what ONNX Runtime says in its usual way, in little space, and in the manifest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_models import TINY_GEOMETRY

from edgeprune.benchmark.expected import PROMPTS, TOKENS, ComparingBackend, Expected, converse, read_expected, write_expected
from edgeprune.bundle import EXPECTED, Bundle
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.export.exporter import export_bundle
from edgeprune.plan.presets import staircase_plan, unpruned_plan
from edgeprune.runtime.api.loading import runtime_on
from edgeprune.runtime.backends.interface import BackendProxy, VisionOutput
from edgeprune.runtime.backends.onnxruntime import OnnxRuntimeBackend
from edgeprune.targets import TARGETS, Lowering


@pytest.fixture(
    scope="module", params=[("jetpack6", "int4"), pytest.param(("jetpack7.2", "fp16"), marks=pytest.mark.slow)], ids=" ".join
)
def bundle(request: pytest.FixtureRequest, even: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target, precision = request.param
    plan = staircase_plan(unpruned_plan("qwen2_vl", 2, TINY_GEOMETRY), "fastv", [0.5], [1])
    return export_bundle(even, plan, tmp_path_factory.mktemp("expected") / "bundle", lowering=Lowering(TARGETS[target], precision))


def compared(bundle: Bundle) -> ComparingBackend:
    expected = read_expected(bundle)
    found = ComparingBackend(OnnxRuntimeBackend(bundle, exact=True), expected)
    converse(runtime_on(bundle, found), expected.prompts, expected.frames)
    return found


def test_stored_outputs_are_those_of_an_ordinary_session(bundle: Bundle) -> None:
    found = compared(bundle)
    assert found.vision < 1e-2 and len(found.logits) == found.steps and max(found.logits) < 1e-2  # float16's rounding
    assert found.kept > 0 and (found.moved, found.equal) == (0, found.steps)
    assert 2 <= found.steps <= len(PROMPTS) * TOKENS


def test_the_file_is_small_and_the_same_each_time(bundle: Bundle) -> None:
    record, before = bundle.manifest.files[EXPECTED], bundle.file(EXPECTED).read_bytes()
    decoder, geometry = bundle.manifest.decoder, bundle.plan.geometry
    numbers = len(PROMPTS) * TOKENS * decoder.vocabulary + geometry.tokens * decoder.hidden
    most = 2 * numbers + 3 * geometry.frames * geometry.width * geometry.height
    assert record.bytes == len(before) < most + 4096
    write_expected(bundle)
    assert bundle.file(EXPECTED).read_bytes() == before


def test_a_value_that_is_no_number_is_no_small_difference() -> None:
    stored = Expected((), [], {"embeds": np.ones((1, 4, 2), np.float16), "logits": np.ones((1, 3), np.float16)})

    class Engines(BackendProxy):
        def encode_image(self, patches: Any, **_: Any) -> VisionOutput:
            return VisionOutput(patches)

    nothing: Any = None
    for value, difference in ((1.0, 0.0), (1.5, 0.5), (np.nan, np.inf), (np.inf, np.inf)):
        found, embeds = ComparingBackend(Engines(nothing), stored), np.ones((1, 4, 2), np.float32)
        embeds[0, 2, 1] = value
        found.encode_image(embeds)
        assert found.vision == difference


def test_a_bundle_for_onnx_runtime_has_none(tiny_bundle: Bundle) -> None:
    assert EXPECTED not in tiny_bundle.manifest.files and not tiny_bundle.file(EXPECTED).parent.exists()


def test_another_model_is_noticed(bundle: Bundle) -> None:
    expected = read_expected(bundle)
    logits = expected.arrays["logits"]
    expected.arrays["logits"] = np.roll(logits, 1, axis=1)
    found = ComparingBackend(OnnxRuntimeBackend(bundle, exact=True), expected)
    converse(runtime_on(bundle, found), expected.prompts, expected.frames)
    assert max(found.logits) > 0.1 and found.equal < found.steps
