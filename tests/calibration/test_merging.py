"""The option merge of the method learned: its training, against what the method does, and what is kept if it helps nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from recorded_scenes import GEOMETRY, recorded

from edgeprune.calibration.data.samples import read_samples
from edgeprune.calibration.learn import training
from edgeprune.calibration.learn.closed import Settings, Sums, closed_form
from edgeprune.calibration.learn.heldout import HeldOut
from edgeprune.calibration.learn.merging import Merger, adding_nothing, merging_loss
from edgeprune.calibration.learn.scenes import Listener, Scene
from edgeprune.calibration.learn.training import Schedule, train
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.methods.learned import Learned, write
from edgeprune.plan import Cut
from edgeprune.tabletop.dataset import write_dataset


@pytest.fixture(scope="module")
def scene(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Listener, Scene]:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_dataset(folder, 1, 6, kinds=("exists", "describe"))
    return recorded(tiny, read_samples(folder / "dataset.jsonl")[:2])


def merging(found: Scene, tiny: LoadedModel) -> tuple[Merger, Learned, dict[str, torch.Tensor]]:
    sums = Sums()
    sums.add(found.visual.embeds[0], found.importance)
    tensors, header = closed_form(sums, Settings(), 4), {"weights_sha256": tiny.weights_sha256, "keeps": [3, 5], "question": 0.0}
    return Merger(sums, 0), Learned(Cut("input", "learned", 5, weights=write(tensors, header)), GEOMETRY), tensors


def test_learning_to_merge_brings_the_decoder_nearer_and_an_interruption_changes_nothing(
    tiny: LoadedModel, scene: tuple[Listener, Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 10)
    listener, found = scene
    scenes: list[Callable[[], Scene]] = [lambda: found, lambda: found.only([0])]
    losses = list[float]()

    def trained(state: Path, stop: int | None = None) -> dict[str, torch.Tensor]:
        def progress(done: int, loss: float) -> None:
            losses.append(loss)
            if done == stop:
                raise KeyboardInterrupt

        merger, method, _ = merging(found, tiny)
        schedule = Schedule(30, (3, 5), 0, weigh=True)
        train(scenes, merger, partial(merging_loss, listener, merger, method, schedule), schedule, state, progress)
        return merger.averaged_tensors()

    whole = trained(tmp_path / "whole")
    assert losses[-1] < 0.8 * losses[1]
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", stop=15)
    again = trained(tmp_path / "parts")
    assert all(torch.allclose(whole[name], again[name], atol=1e-5) for name in whole)

    # What training measured is what the method does, and what adds nothing is the method without the option.
    _, method, tensors = merging(found, tiny)
    options = {"merge": True, "weigh": True}

    def divergence(tensors: dict[str, torch.Tensor], options: dict[str, bool]) -> float:
        cut = Cut("input", "learned", 5, options=options, weights=write(tensors, method.header))
        return HeldOut(listener, [lambda: found], 48).divergence(Learned(cut, GEOMETRY), (5,), weigh=True)

    plain = divergence(tensors, {"weigh": True})
    assert divergence(tensors | adding_nothing(whole), options) == pytest.approx(plain, rel=1e-5)
    assert divergence(tensors | whole, options) < plain
