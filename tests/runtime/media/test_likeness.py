"""How far an image is from those that a selection was learned from: by hand, in answers, on the command line and in reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from learned_weights import drawn_weights
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.cli import main
from edgeprune.cli.output.basic import show_answer
from edgeprune.errors import PlanError
from edgeprune.export.exporter import export_bundle
from edgeprune.methods.base import InputView
from edgeprune.methods.learned import Learned, read, write
from edgeprune.plan import Cut, Geometry, KeepPlan, Weights
from edgeprune.plan.presets import unpruned_plan
from edgeprune.report.gather import collect_answers
from edgeprune.runtime import load
from edgeprune.runtime.media.likeness import Likeness
from edgeprune.runtime.telemetry.metrics import Metrics
from edgeprune.runtime.telemetry.receipt import Receipt

BASE = unpruned_plan("qwen2_vl", 3, Geometry(84, 112, 14, 2))
SEEN: dict[str, Any] = {"mean": [0.1, -0.2, 0.3, 0.0], "deviation": [0.2, 0.4, 0.1, 0.5], "limit": 2.0}


def planned(weights: Weights) -> KeepPlan:
    return BASE.with_cuts(Cut("input", "learned", 5, weights=weights))


def test_the_distance_by_hand_and_by_the_method() -> None:
    weights = drawn_weights(12, seen=SEEN)
    tokens = torch.randn(1, 9, 12, generator=torch.Generator().manual_seed(3))
    seen = InputView(tokens[0], tokens[0])
    place = Learned(Cut("input", "learned", 5, weights=weights), BASE.geometry).places(seen).mean(dim=0).numpy()
    total = sum(((at - m) / d) ** 2 for at, m, d in zip(place, SEEN["mean"], SEEN["deviation"], strict=True))
    likeness = Likeness.of(planned(weights))
    assert likeness is not None
    assert likeness.distance(tokens.numpy()) == pytest.approx((total / 4) ** 0.5 / 2.0, rel=1e-5)
    half, wider = tokens.half(), torch.cat([tokens, torch.full((1, 9, 3), 9.0)], dim=2)  # columns of later layers
    assert likeness.distance(half.numpy()) == pytest.approx(likeness.distance(tokens.numpy()), rel=1e-2)
    assert likeness.distance(wider.numpy()) == likeness.distance(tokens.numpy())
    broken = tokens.clone()
    broken[0, 2] = float("nan")
    broken[0, 3] = 1e38
    assert np.isfinite(likeness.distance(broken.numpy()))


def test_what_does_not_say_has_no_distance() -> None:
    assert Likeness.of(planned(drawn_weights(12))) is None  # of an earlier version
    assert Likeness.of(BASE) is None
    assert Likeness.of(BASE.with_cuts(Cut("input", "divprune", 5))) is None


def without(name: str) -> Weights:
    header, tensors = read(drawn_weights(12, seen=SEEN))
    return write({key: each for key, each in tensors.items() if key != name}, header)


@pytest.mark.parametrize(
    "weights",
    [
        Weights.of(b""),
        Weights.of((drawn_weights(12, seen=SEEN).content or b"")[:-250]),
        without("metric_bias"),
        drawn_weights(12, seen=[]),
        drawn_weights(12, seen={**SEEN, "limit": 0.0}),
        drawn_weights(12, seen={**SEEN, "limit": "far"}),
        drawn_weights(12, seen={**SEEN, "mean": [0.0]}),
        drawn_weights(12, seen={**SEEN, "deviation": [0.2, 0.4, 0.0, 0.5]}),
        drawn_weights(12, seen={**SEEN, "mean": [0.0, 10**400, 0.0, 0.0]}),
    ],
)
def test_weights_that_cannot_be_read_are_refused(weights: Weights) -> None:
    with pytest.raises(PlanError, match="are not readable"):
        Likeness.of(planned(weights))


@pytest.fixture(scope="module")
def bundle(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    # Every image is beyond its limit.
    weights = drawn_weights(48, model=tiny.weights_sha256, seen={**SEEN, "limit": 0.01})
    return export_bundle(tiny, planned(weights), tmp_path_factory.mktemp("bundles") / "learned")


def test_answers_tell_how_far_each_new_image_is(bundle: Bundle, tiny_image: Image.Image) -> None:
    with load(bundle.path, threads=1) as model:
        likeness = model._pipeline.likeness
        assert likeness is not None
        images = [tiny_image, Image.new("RGB", tiny_image.size)]
        encoded = [model._pipeline.backend.encode_image(model._pipeline.image_spec.patches([image])) for image in images]
        far = [likeness.distance(each.embeds) for each in encoded]
        first, again = (model.generate(images, "Which?", max_tokens=2).receipt for _ in range(2))
        assert first.image_distances == again.image_distances == far
        assert "vision" in again.reused and first.images_unlike == 2
        metrics = Metrics()
        metrics.observe(first)
        assert metrics.registry.get_sample_value("edgeprune_images_unlike_total") == 2
        assert (first.to_dict()["image_distances"], first.to_dict()["images_unlike"]) == (far, 2)
        assert model.generate(images, "Which?", max_tokens=2, prune=False).receipt.image_distances == []
        chat = model.chat()
        "".join(chat.ask("Which?", tiny_image, max_tokens=2))
        later = chat.ask("And now?", max_tokens=2)
        "".join(later)
        assert later.receipt.image_distances == []
        model._pipeline = replace(model._pipeline, likeness=replace(likeness, limit=1e6))
        model.forget()
        assert model.generate(images, "Which?", max_tokens=2).receipt.images_unlike == 0


def test_the_command_and_the_report_warn(bundle: Bundle, tiny_image: Image.Image, tmp_path: Path) -> None:
    tiny_image.save(image := tmp_path / "image.png")
    words = ["run", str(bundle.path), "--image", str(image), "--prompt", "Which?", "--max-tokens", "2"]
    shown = CliRunner().invoke(main, words)
    assert "the image looks unlike those that the choice of tokens was learned from (" in shown.stderr
    assert json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)["receipt"]["images_unlike"] == 1
    with load(bundle.path, threads=1) as model:
        (asked,) = collect_answers(model, tiny_image, ["Which?"], max_tokens=2).asked
        facts = {name: value for name, value, _ in asked.facts}
        assert "unlike those" in facts["distance from the calibration's images"]
        likeness = model._pipeline.likeness
        assert likeness is not None
        model._pipeline = replace(model._pipeline, likeness=replace(likeness, limit=1e6))
        (asked,) = collect_answers(model, tiny_image, ["Which?"], max_tokens=2).asked
        assert {name: value for name, value, _ in asked.facts}["distance from the calibration's images"].endswith(
            "(1 is the limit)"
        )


def test_one_of_several_images_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    class Ended(Iterator[str]):
        receipt = Receipt(True, "", finish_reason="end", image_distances=[0.5, 2.4])

        def __next__(self) -> str:
            raise StopIteration

    ended: Any = Ended()
    show_answer(ended, as_json=False)
    assert "1 of 2 images look unlike" in (shown := capsys.readouterr().err) and "2.4 times the limit" in shown
    Ended.receipt = Receipt(True, "", finish_reason="end", image_distances=[0.5])
    show_answer(ended, as_json=False)
    assert "unlike" not in capsys.readouterr().err
