"""`verify` passes on what was exported and names the stage at fault when something is broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from altered import change_weight, first_failure, sealed

from edgeprune.bundle import CHAT_TEMPLATE, DECODER, MANIFEST, PREPROCESSOR, VISION, Bundle
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.errors import VerificationError
from edgeprune.export.verification import verify
from edgeprune.runtime.backends.compare import differing_indices, largest_difference

STAGES = ["prompts", "pixels", "vision", "kept", "prefill", "generation", "text", "unpruned text"]


def test_an_exported_bundle_verifies(tiny_bundle: Bundle, tiny: LoadedModel) -> None:
    report = verify(tiny_bundle, tiny)
    assert [stage.name for stage in report] == STAGES
    assert first_failure(report) is None, report


def test_a_wrong_chat_template_is_named(altered_bundle: Path, tiny: LoadedModel) -> None:
    path = altered_bundle / CHAT_TEMPLATE
    path.write_text(path.read_text().replace("<|im_start|>assistant", "<|im_start|>model"))
    report = verify(sealed(altered_bundle), tiny)
    assert first_failure(report) == "prompts"
    assert report[0].compared.startswith("differs for one image, a system prompt")


def test_a_lost_repetition_penalty_is_named(altered_bundle: Path, tiny: LoadedModel) -> None:
    # Both answers of the bundle would follow its manifest, and the reference is ours.
    path = altered_bundle / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["generation"]["repetition_penalty"] = 5.0
    path.write_text(json.dumps(manifest))
    assert {"unpruned text"} <= {stage.name for stage in verify(sealed(altered_bundle), tiny) if not stage.passed}


def test_a_wrong_pixel_setting_is_named(altered_bundle: Path, tiny: LoadedModel) -> None:
    settings = json.loads((altered_bundle / PREPROCESSOR).read_text())
    settings["image_mean"] = [0.5, 0.5, 0.51]
    (altered_bundle / PREPROCESSOR).write_text(json.dumps(settings))
    assert first_failure(verify(sealed(altered_bundle), tiny)) == "pixels"


def test_a_wrong_vision_weight_is_named(altered_bundle: Path, tiny: LoadedModel) -> None:
    change_weight(altered_bundle, VISION, "norm1.bias", 0.05)
    assert first_failure(verify(sealed(altered_bundle), tiny)) == "vision"


def test_a_wrong_selection_is_named(altered_bundle: Path, tiny: LoadedModel) -> None:
    # The first layer's keys decide what FastV keeps before layer 1.
    change_weight(altered_bundle, DECODER, "layers.0.self_attn.q_proj.weight", 0.7)
    assert first_failure(verify(sealed(altered_bundle), tiny)) == "kept"


def test_a_wrong_decoder_weight_is_named(altered_bundle: Path, tiny: LoadedModel) -> None:
    change_weight(altered_bundle, DECODER, "lm_head.weight", 0.01)
    assert first_failure(verify(sealed(altered_bundle), tiny)) == "prefill"


def test_another_model_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(VerificationError, match="other weights"):
        verify(tiny_bundle, load_model(resolve_model("tabletop")))


def test_a_copied_bundle_still_verifies(tiny_bundle: Bundle, tiny: LoadedModel, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "elsewhere")
    assert first_failure(verify(Bundle.load(tmp_path / "elsewhere"), tiny)) is None


def test_differences_are_those_of_the_worst_array() -> None:
    expected = np.array([[1.0, -4.0]])
    pairs = [(expected, expected), (expected, np.array([[1.0, -3.0]])), (np.array([10.0]), np.array([11.0]))]
    assert largest_difference(pairs) == 0.25
    assert largest_difference([]) == 0
    for unlike in (np.array([1.0, -4.0]), np.array([[1.0, np.nan]])):
        assert largest_difference([*pairs, (expected, unlike)]) == float("inf")


def test_kept_indices_differ_as_sets_head_by_head() -> None:
    assert differing_indices([(np.array([0, 2, 5]), np.array([5, 0, 3]))]) == 2
    assert differing_indices([(np.array([[0, 1], [2, 3]]), np.array([[1, 0], [0, 3]]))]) == 2


def test_what_cannot_be_compared_is_said(altered_bundle: Path, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.export.upstream.chat_template", lambda _: None)
    stages = {stage.name: stage for stage in verify(sealed(altered_bundle), tiny)}
    for name in ("prompts", "unpruned text"):
        assert (stages[name].worst, stages[name].passed) == (None, True)
        assert stages[name].compared == "the checkpoint has no chat template"
