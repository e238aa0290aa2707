"""DyRate: policies played on recorded answers, forms by hand, and a predictor that learns what there is to learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune.calibration.allocate.decode_rate import (
    SHARES,
    PolicyReplay,
    RecordedAnswer,
    _isotonic,
    _needed,
    fit_budget,
    mean_share,
    schedule_form,
)
from edgeprune.calibration.allocate.dyrate import _fit_bias, dyrate_options, rate_of, train
from edgeprune.calibration.data.samples import Sample, read_samples
from edgeprune.calibration.replay.episodes import Recorder
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import UsageError
from edgeprune.io.progress import SILENT
from edgeprune.methods.dyrate import DyRate, Predictor
from edgeprune.plan import Cut, Geometry
from edgeprune.plan.presets import ranked_plan, unpruned_plan
from edgeprune.tabletop.dataset import write_dataset

GEOMETRY = Geometry(84, 84, 14, 2)
PLAN = ranked_plan(unpruned_plan("qwen2_vl", 3, GEOMETRY))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_dataset(folder, 2, 6)
    return read_samples(folder / "dataset.jsonl")[:4]


def theatre(tiny: LoadedModel, *, monotone: bool = True, layer: int = 0) -> PolicyReplay:
    return PolicyReplay(Recorder(tiny, PLAN, 8, "cpu"), layer, monotone=monotone)


@pytest.fixture(scope="module")
def answers(tiny: LoadedModel, samples: list[Sample]) -> list[RecordedAnswer]:
    return theatre(tiny).record(samples, "exact", 2, lambda done: None)


def test_reading_everything_costs_nothing(tiny: LoadedModel, answers: list[RecordedAnswer]) -> None:
    costs = theatre(tiny).constant_costs(answers[0])
    assert costs.shape == (len(SHARES), answers[0].episode.steps)
    assert np.abs(costs[0]).max() < 1e-9
    assert costs[-1].min() > 0


def test_a_policy_costs_what_the_runtime_would_read(tiny: LoadedModel, answers: list[RecordedAnswer]) -> None:
    # The first step alone may look: every later one is hidden, which shows in the logits from step 1 on.
    stage, answer = theatre(tiny), answers[0]
    steps = answer.episode.steps
    with torch.no_grad():
        logits, _ = stage.replay_ratios(answer, [1.0] + [0.0] * (steps - 1))
    assert torch.allclose(logits[0], answer.logits[0], atol=1e-4)
    assert not torch.allclose(logits[1], answer.logits[1], atol=1e-3)


def test_shares_never_grow_unless_allowed(tiny: LoadedModel, answers: list[RecordedAnswer]) -> None:
    asked = np.linspace(0.2, 0.9, answers[0].episode.steps).tolist()
    falling, _ = theatre(tiny).settle_policy(answers[0], lambda seen: asked)
    free, _ = theatre(tiny, monotone=False).settle_policy(answers[0], lambda seen: asked)
    assert np.allclose(falling, 0.2) and np.allclose(free, asked)


def test_earlier_layers_are_left_alone(tiny: LoadedModel, answers: list[RecordedAnswer]) -> None:
    with torch.no_grad():
        steps = answers[0].episode.steps
        none = theatre(tiny, layer=3).replay_ratios(answers[0], [0.0] * steps)[0]
        last = theatre(tiny, layer=2).replay_ratios(answers[0], [0.0] * steps)[0]
    assert torch.allclose(none, answers[0].logits, atol=1e-4)
    assert not torch.allclose(last, answers[0].logits, atol=1e-3)


def test_a_gradient_reaches_the_choice(tiny: LoadedModel, answers: list[RecordedAnswer]) -> None:
    steps = answers[0].episode.steps
    picked = torch.eye(len(SHARES))[[2] * steps].requires_grad_()
    theatre(tiny).replay_weights(answers[0], picked, SHARES)[0].square().sum().backward()  # type: ignore[no-untyped-call]
    assert picked.grad is not None and picked.grad.abs().sum() > 0


@pytest.mark.parametrize("form", ["predictor", "schedule", "map"])
def test_every_form_keeps_the_budget(
    form: str, tiny: LoadedModel, answers: list[RecordedAnswer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.calibration.allocate.dyrate.WARM_STEPS", 20)
    monkeypatch.setattr("edgeprune.calibration.allocate.dyrate.EPOCHS", 1)
    options = dyrate_options(theatre(tiny), answers, 0.4, form, 0, SILENT)
    cut = Cut("decode", "dyrate", 0, options=options)
    rate = DyRate(cut, GEOMETRY)
    stage = theatre(tiny)
    if form == "schedule":
        by_step = np.repeat(options["shares"], np.diff([*options["steps"], 64]))
        spent = mean_share([by_step[: answer.episode.steps] for answer in answers])
    else:
        module = rate.rate_predictor()
        spent = mean_share(
            [
                stage.settle_policy(
                    a, lambda seen: [float(module(row, torch.tensor([float(t)]))[0]) for t, row in enumerate(seen)]
                )[0]
                for a in answers
            ]
        )
    assert 0.0 < spent <= 0.4 + 1e-6


def test_training_is_repeatable(tiny: LoadedModel, answers: list[RecordedAnswer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.calibration.allocate.dyrate.WARM_STEPS", 5)
    monkeypatch.setattr("edgeprune.calibration.allocate.dyrate.EPOCHS", 1)
    weights = [train(theatre(tiny), answers[:2], 0.5, seed, SILENT).weight.detach() for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_bias_meets_the_budget(tiny: LoadedModel, answers: list[RecordedAnswer]) -> None:
    greedy = Predictor(torch.zeros(len(SHARES), 13), torch.zeros(len(SHARES)), torch.tensor(SHARES))
    spent = []
    for budget in (0.3, 0.8):
        fitted = _fit_bias(theatre(tiny), answers, greedy, budget)
        spent.append(mean_share([theatre(tiny).settle_policy(answer, rate_of(fitted))[0] for answer in answers]))
    assert spent[0] <= 0.3 + 1e-6 and spent[1] <= 0.8 + 1e-6


def test_a_schedule_by_hand(tiny: LoadedModel) -> None:
    # Means by step: 1, .6, .2, .2; over 4 + 2 steps they spend (1 + .6 + .2 + .2 + 1 + .6) / 6 = .6, the budget.
    rows = [np.array([1.0, 0.8, 0.2, 0.2]), np.array([1.0, 0.4])]
    form = schedule_form(theatre(tiny), rows, 0.6)
    assert form["steps"] == [0, 1, 2]
    assert form["shares"] == pytest.approx([1.0, 0.6, 0.2], abs=0.011)


def test_isotonic_by_hand() -> None:
    assert _isotonic(np.array([1.0, 3.0, 2.0, 4.0])).tolist() == [1.0, 2.5, 2.5, 4.0]


def test_the_needed_share_by_hand() -> None:
    costs = np.zeros((len(SHARES), 3))
    costs[3:, 1] = 1.0  # step 1 goes wrong below SHARES[2]
    costs[1:, 2] = 1.0  # step 2 needs everything
    assert _needed(costs, 0.5).tolist() == [SHARES[-1], SHARES[2], SHARES[0]]


def test_fitting_a_budget() -> None:
    assert fit_budget(lambda x: x * x, 0.25, 0.0, 1.0) == pytest.approx(0.5, abs=1e-3)


def test_short_answers_teach_nothing(tiny: LoadedModel, samples: list[Sample]) -> None:
    with pytest.raises(UsageError, match="no rate to learn"):
        theatre(tiny).record(samples, "exact", 99, lambda done: None)


def test_settings_survive_the_plan(tmp_path: Path) -> None:
    predictor = Predictor(torch.randn(3, 13), torch.randn(3), torch.tensor([1.0, 0.5, 0.1]))
    restored = DyRate(Cut("decode", "dyrate", 0, options=predictor.settings()), GEOMETRY).rate_predictor()
    split = torch.rand(3, 4)
    assert torch.equal(predictor(split, torch.ones(1)), restored(split, torch.ones(1)))
