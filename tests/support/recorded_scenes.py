"""Recorded scenes of a model for tests of what calibration learns, and methods that keep what a function says."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgeprune.calibration.data.samples import Sample
from edgeprune.calibration.learn import run
from edgeprune.calibration.learn.scenes import Listener, Scene
from edgeprune.calibration.replay.episodes import Recorder
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.methods.base import InputView
from edgeprune.plan import Geometry
from edgeprune.plan.presets import unpruned_plan

GEOMETRY = Geometry(84, 112, 14, 2)


class Chosen:
    """A method that keeps what a function says."""

    def __init__(self, select: Callable[[InputView, int], torch.Tensor]) -> None:
        self.select = select


def recorded(model: LoadedModel, samples: list[Sample], geometry: Geometry = GEOMETRY) -> tuple[Listener, Scene]:
    plan = unpruned_plan(model.folder.model_type, model.decoder_shape().layers, geometry)
    recorder = Recorder(model, plan, 6, "cpu")
    listener = Listener(recorder.decoder)
    (scene,) = run._scenes_of(recorder, listener, samples, "pad")
    return listener, scene
