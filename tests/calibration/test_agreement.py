"""Agreement: equal answers score 1, and retelling tells how far a plan is from the unpruned model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeprune.calibration.data.samples import Sample, Score, read_samples
from edgeprune.calibration.replay.episodes import Recorder
from edgeprune.calibration.search.objectives import Agreement
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.plan import Cut, Geometry
from edgeprune.plan.presets import unpruned_plan
from edgeprune.tabletop.dataset import write_dataset
from edgeprune.tabletop.questions import DESCRIBE

WHOLE = unpruned_plan("qwen2_vl", 3, Geometry(84, 84, 14, 2))


@pytest.fixture(scope="module")
def agreement(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Agreement:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_dataset(folder, 1, 8)
    samples = read_samples(folder / "dataset.jsonl", 3)
    return Agreement(tiny, WHOLE, samples, max_tokens=5, fit="exact", device="cpu")


def test_the_unpruned_plan_agrees_with_itself(agreement: Agreement) -> None:
    assert agreement.score(WHOLE, 3).mean == 1.0
    assert agreement.divergences([WHOLE]) == [pytest.approx(0.0, abs=1e-6)]


def test_fewer_tokens_are_farther_away(agreement: Agreement) -> None:
    plans = [WHOLE.with_cuts(Cut("input", "uniform", keep)) for keep in (8, 1)]
    near, far = agreement.divergences(plans)
    assert 0.0 < near < far
    assert agreement.score(plans[1], 3).mean <= agreement.score(plans[0], 3).mean <= 1.0


def test_the_score_is_over_the_first_samples(agreement: Agreement, tmp_path: Path) -> None:
    assert len(agreement) == 3
    assert agreement.score(WHOLE, 1).mean == 1.0


def test_no_sample_is_asked_in_vain(agreement: Agreement, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    retell = Recorder.teacher_forced_logits

    def counting(recorder: Recorder, sample: Sample, *rest: Any) -> Any:
        asked.append(sample.prompt)
        return retell(recorder, sample, *rest)

    agreement.score(WHOLE, 3)  # what the unpruned plan retells is known now
    monkeypatch.setattr(Recorder, "teacher_forced_logits", counting)
    whole = WHOLE.with_cuts(Cut("input", "uniform", 9))  # agrees in everything
    assert agreement.score(whole, 2).mean == 1.0 and len(asked) == 2
    assert agreement.score(whole, 3).complete and len(asked) == 3
    lost = WHOLE.with_cuts(Cut("input", "uniform", 1, seed=5))
    reached = agreement.score(lost, 3, least=1.0)
    alone = agreement.score(lost, 3)
    assert reached.complete == (alone.mean == 1.0) and reached.mean <= alone.mean
    assert len(asked) == 6  # what was left is asked now, and nothing twice


def test_what_is_retold_equals_the_answer_where_what_is_generated_does(
    agreement: Agreement, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for keep, method in ((8, "uniform"), (5, "divprune"), (2, "uniform"), (1, "random")):
        plan = WHOLE.with_cuts(Cut("input", method, keep))
        retold = [agreement.score(plan, count).mean * count for count in (1, 2, 3)]
        generated = [answer.text for answer in agreement._each_answer(plan, agreement._samples)]
        equal = [text == sample.answer for text, sample in zip(generated, agreement._samples, strict=True)]
        assert retold == pytest.approx([sum(equal[:count]) for count in (1, 2, 3)])
        seen |= set(equal)
    assert seen == {True, False}


def test_one_description_counts_as_much_as_all_short_answers(agreement: Agreement, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["colour", "count", DESCRIBE]
    monkeypatch.setattr(agreement, "_samples", [replace(s, kind=k) for s, k in zip(agreement._samples, kinds, strict=True)])
    facts = iter([Score(1, 1, 1), Score(0, 1, 1), Score(1, 2, 2)])
    monkeypatch.setattr("edgeprune.calibration.search.objectives.score", lambda sample, text: next(facts))
    found = agreement.score(WHOLE.with_cuts(Cut("input", "uniform", 7)), 3)
    assert found.mean == pytest.approx((0.5 + 0.5) / 2) and found.facts == Score(1, 2, 2)
