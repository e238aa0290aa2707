"""The bundled model as its card says, on a few scenes of a seed that training never drew from: one image, two, and blind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from edgeprune.checkpoint.loading import load_model, resolve_model
from edgeprune.export.exporter import export_bundle
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime import Runtime, load
from edgeprune.tabletop.dataset import pairs, scenes
from edgeprune.tabletop.drawing import draw_scene
from edgeprune.tabletop.questions import DESCRIBE, Question
from edgeprune.tabletop.world import SIDE, Scene

GREY = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    loaded = load_model(resolve_model("tabletop"))
    plan = unpruned_plan(loaded.folder.model_type, loaded.decoder_shape().layers, loaded.geometry(None))
    return load(export_bundle(loaded, plan, tmp_path_factory.mktemp("whole") / "table.bundle").path)


def share_right(model: Runtime, asked: Sequence[tuple[Sequence[Scene], list[Question]]], *, blind: bool = False) -> float:
    """Return the share of short answers that are right."""
    right = [
        model.generate([GREY if blind else draw_scene(scene) for scene in shown], question.prompt).text == question.answer
        for shown, questions in asked
        for question in questions
        if question.kind != DESCRIBE
    ]
    assert len(right) > 30
    return float(np.mean(right))


def test_it_answers_about_one_image(model: Runtime) -> None:
    asked = [((scene,), questions) for scene, questions in scenes(1, 6)]
    assert share_right(model, asked) >= 0.98
    assert share_right(model, asked, blind=True) < 0.35


def test_it_answers_about_two_images(model: Runtime) -> None:
    asked = list(pairs(1, 10))
    assert share_right(model, asked) >= 0.95
    assert share_right(model, asked, blind=True) < 0.4


def test_the_order_of_two_images_matters(model: Runtime) -> None:
    swapped = {"first": "second", "second": "first", "both": "both", "neither": "neither"}
    for pair, questions in pairs(1, 10):
        question = next(question for question in questions if question.kind == "which")
        answers = [model.generate([draw_scene(scene) for scene in order], question.prompt).text for order in (pair, pair[::-1])]
        assert answers[1] == swapped[answers[0]], question
