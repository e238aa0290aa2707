"""The scores of an evaluation: facts of descriptions by precision, recall and F1, short answers by their share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from edgeprune.calibration.data.samples import Sample
from edgeprune.calibration.evaluation import ALL, PRUNED, UNPRUNED, EvalReport
from edgeprune.calibration.replay.reference import TorchBackend, reference_model
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.cli.output.evaluate import show_evaluation
from edgeprune.plan import KeepPlan
from edgeprune.targets import TARGETS, Lowering

DESCRIPTION = Sample(Path(), "Describe.", "red cube at top, blue ball at left.", "describe")
SHORT = Sample(Path(), "What?", "red", "colour")


@dataclass
class Times:
    """The times of an answer."""

    ttft_ms: float = 1.0
    decode_ms: list[float] = field(default_factory=list)


@dataclass
class Receipt:
    """What an answer cost."""

    times: Times = field(default_factory=Times)
    kv_bytes: int = 8
    visual_kv_share: float = 0.5
    visual_read_share: float = 0.25
    finish_reason: str = "end"


@dataclass
class Answer:
    """An answer without a model."""

    text: str
    receipt: Receipt = field(default_factory=Receipt)


def report() -> EvalReport:
    found = EvalReport(pruned=True)
    for sample, pruned, unpruned in (
        (DESCRIPTION, "red cube at top.", "red cube at top, blue ball at left."),
        (DESCRIPTION, "", "red cube at top, blue ball at left."),
        (SHORT, "blue", "red"),
        (SHORT, "red", "red"),
    ):
        found.add(sample, {PRUNED: Answer(pruned), UNPRUNED: Answer(unpruned)})  # type: ignore[dict-item]
    return found


def test_facts_that_are_left_out_are_lost() -> None:
    described = report().to_dict()["kinds"]["describe"]
    assert described["precision"] == {PRUNED: 1.0, UNPRUNED: 1.0}
    assert described["recall"] == {PRUNED: 0.25, UNPRUNED: 1.0}
    assert described["f1"] == pytest.approx({PRUNED: 0.4, UNPRUNED: 1.0})
    assert (described[PRUNED], described[UNPRUNED], described["agreement"]) == (pytest.approx(0.4), 1.0, 0.0)


def test_short_answers_are_a_share() -> None:
    kinds = report().to_dict()["kinds"]
    assert kinds["colour"] == {"asked": 2, PRUNED: 0.5, UNPRUNED: 1.0, "agreement": 0.5, "visual_reads": 0.25}
    assert kinds[ALL] == kinds["colour"]


def test_all_three_measures_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show_evaluation(report(), [], as_json=False)
    lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert lines["describe: F1 of facts"][-5:] == ["2", "40.0%", "100.0%", "0.0%", "25.0%"]
    assert lines["describe: precision of facts"][-2:] == ["100.0%", "100.0%"]
    assert lines["describe: recall of facts"][-2:] == ["25.0%", "100.0%"]
    assert lines["colour"][-5:] == ["2", "50.0%", "100.0%", "50.0%", "25.0%"]


def test_an_image_is_encoded_once_for_the_questions_about_it(tiny: LoadedModel, tiny_plan: KeepPlan) -> None:
    backend = reference_model(tiny, tiny_plan).backend
    assert isinstance(backend, TorchBackend)
    rng = np.random.default_rng(0)
    one, other = (rng.standard_normal((48, 3 * 2 * 14 * 14), np.float32) for _ in range(2))
    with mock.patch.object(backend, "_encoded", wraps=backend._encoded) as encoded:
        first = backend.encode_image(one)
        assert backend.encode_image(one.copy()) is first
        assert not np.array_equal(backend.encode_image(other).embeds, first.embeds)
        assert np.array_equal(backend.encode_image(one).embeds, first.embeds)
        assert np.array_equal(backend.encode_image(one, unpruned=True).embeds, first.embeds)
        assert encoded.call_count == 3  # the plan has no cut in the encoder
        with backend.lowered(Lowering(TARGETS["onnxruntime"], "int8")):  # other weights, other embeddings
            assert not np.array_equal(backend.encode_image(one, unpruned=True).embeds, first.embeds)
        assert np.array_equal(backend.encode_image(one, unpruned=True).embeds, first.embeds)
