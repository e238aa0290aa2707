"""Where the parts of a family lie: what they make beside the weights, such as tables of positions, has to be there too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import load_model, resolve_model
from edgeprune.families.base import DecoderParts, Family
from edgeprune.plan import KeepPlan
from edgeprune.runtime import Runtime
from edgeprune.runtime.backends.compare import RecordingBackend, largest_difference


class Placed(Family):
    """Notes where tensors are made while it builds."""

    name = "placed"

    def __init__(self, device: str) -> None:
        super().__init__(SimpleNamespace(device=torch.device(device)))
        self.places: list[str] = []

    def vision(self, *_: Any, **__: Any) -> Any:
        self.places.append(str(torch.get_default_device()))

    def decoder(self) -> DecoderParts:
        self.places.append(str(torch.get_default_device()))
        return None  # type: ignore[return-value]


@pytest.mark.parametrize(("weights", "made"), [("cpu", "cpu"), ("cuda:0", "cuda:0"), ("meta", "cpu")])
def test_tables_are_made_where_the_weights_are(weights: str, made: str) -> None:
    family = Placed(weights)
    family.vision(None)
    family.decoder()
    assert family.places == [made, made]
    assert str(torch.get_default_device()) == "cpu"


@pytest.mark.device
def test_a_gpu_answers_as_the_cpu(tiny_folder: Path, tiny_plan: KeepPlan) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU and a CUDA build of torch")
    size = tiny_plan.geometry.height, tiny_plan.geometry.width, 3
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
    answers, logits = [], []
    for device in ("cpu", "cuda"):
        reference = reference_model(load_model(resolve_model(str(tiny_folder))), tiny_plan, device)
        recorder = RecordingBackend(reference.backend)
        answers.append(Runtime(replace(reference, backend=recorder)).generate(picture, "What is this?", max_tokens=8).text)
        logits.append(recorder.steps[0].logits)
    assert answers[0] == answers[1]
    assert largest_difference([(logits[0], logits[1])]) < 1e-3
