"""The share of the position in the method learned: what is recorded for it, and when a search takes it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recorded_scenes import GEOMETRY

from edgeprune.calibration.data.journal import Journal
from edgeprune.calibration.data.samples import read_samples
from edgeprune.calibration.learn import run
from edgeprune.calibration.learn.closed import Settings
from edgeprune.calibration.learn.scenes import Listener, Scene
from edgeprune.calibration.replay.episodes import Recorder
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.plan import Cut
from edgeprune.plan.presets import unpruned_plan
from edgeprune.tabletop.dataset import write_dataset


def test_a_recording_knows_which_tokens_the_encoder_kept(tiny: LoadedModel, tmp_path: Path) -> None:
    write_dataset(tmp_path / "scenes", 1, 6, kinds=("exists",))
    samples = read_samples(tmp_path / "scenes" / "dataset.jsonl")[:1]
    plan = unpruned_plan("qwen2_vl", 3, GEOMETRY).with_cuts(Cut("vision", "uniform", 7, layer=1))
    recorder = Recorder(tiny, plan, 3, "cpu")
    (scene,) = run._scenes_of(recorder, Listener(recorder.decoder), samples, "pad")
    order = scene.order.tolist()
    assert len(order) == 7 and order == sorted(set(order)) and order[-1] < GEOMETRY.tokens and order != list(range(7))
    scene.save(tmp_path / "scene.safetensors")
    assert torch.equal(Scene.load(tmp_path / "scene.safetensors", "cpu").order, scene.order)


# Without and with the question, shares of 0, 0.1 and 0.2: nats an answer, which a description makes most of, and nats a token.
@pytest.mark.parametrize(
    ("measured", "asks", "taken"),
    [
        ({(0.0, 0.0): (1.0, 0.10), (0.0, 0.1): (1.1, 0.08), (0.0, 0.2): (1.2, 0.07)}, 0.0, (0.0, 0.2)),
        ({(0.0, 0.0): (1.0, 0.10), (0.0, 0.1): (1.1, 0.07), (0.0, 0.2): (0.9, 0.08)}, 0.0, (0.0, 0.1)),
        ({(0.0, 0.0): (1.0, 0.10), (0.0, 0.1): (0.5, 0.11), (0.0, 0.2): (0.4, 0.12)}, 0.0, None),
        # The question alone was not worth it; with the position it is.
        ({(0.0, 0.0): (1.0, 0.10), (1.5, 0.0): (0.95, 0.095), (1.5, 0.1): (1.0, 0.08)}, 0.0, (1.5, 0.1)),
        ({(0.0, 0.0): (1.0, 0.10), (1.5, 0.0): (0.8, 0.07), (1.5, 0.1): (0.7, 0.08)}, 1.5, None),
    ],
)
def test_a_search_takes_positions_where_every_answer_counts_alike(
    measured: dict[tuple[float, float], tuple[float, float]],
    asks: float,
    taken: tuple[float, float] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def divergences(method: Settings, keeps: Any, *, weigh: bool) -> tuple[float, float]:
        return measured.get((method.question, method.position), (9.0, 9.0))

    judge = SimpleNamespace(divergences=divergences)
    request = SimpleNamespace(keeps=(5,), weigh=False)
    course = run._Course(None, None, request, (), judge, None, {}, Journal(), None)  # type: ignore[arg-type]
    monkeypatch.setattr(run._Course, "method", lambda self, tensors, settings: settings)
    counted, forms = list[int](), [({"form": torch.tensor(question)}, Settings(question=question)) for question in (0.0, 1.5)]
    found = course.positioned(forms, Settings(question=asks), counted.append)
    assert counted == [1, 2, 3, 4]
    if taken is None:
        assert found is None
    else:
        question, position = taken
        assert found == ({"form": torch.tensor(question)}, measured[taken][0], Settings(question=question, position=position))
