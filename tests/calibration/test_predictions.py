"""Predictions: an evaluation goes on where it was interrupted, and never mixes two runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeprune.calibration.data.samples import Sample, StoredImage
from edgeprune.calibration.evaluation import PRUNED, UNPRUNED, evaluate
from edgeprune.calibration.metrics import metric_for
from edgeprune.calibration.predictions import Prediction, Predictions
from edgeprune.errors import UsageError

RUN = {"model": "bundle 12", "metric": "exact"}
SAMPLES = [Sample(Path("a.png"), f"What is {number}?", str(number)) for number in range(3)]
SAID = Prediction("1", 2.5, (0.5, 0.25), 1024, 0.5, 0.25, "end")


class Counting:
    """A model that answers each prompt by its number, and counts what it is asked."""

    tiers = ()

    def __init__(self, *, pruned: bool = True, breaks_at: int = -1) -> None:
        self.plan = type("Plan", (), {"cuts": (1,) * pruned})
        self.asked: list[str] = []
        self._breaks_at = breaks_at

    def generate(self, image: Any, prompt: str, **options: Any) -> Any:
        """Return the number in the prompt, or raise as Ctrl-C does."""
        if len(self.asked) == self._breaks_at:
            raise KeyboardInterrupt
        self.asked.append(prompt)
        times = type("Times", (), {"ttft_ms": 1.0, "decode_ms": [0.5]})
        receipt = type("Receipt", (), {"times": times, "kv_bytes": 8, "visual_kv_share": 0.5, "visual_read_share": 0.5})
        receipt.finish_reason = "end"  # type: ignore[attr-defined]
        return type("Answer", (), {"text": prompt.split()[-1].rstrip("?"), "receipt": receipt})


def run(model: Counting, path: Path, samples: list[Sample] = SAMPLES) -> dict[str, Any]:
    metric, samples = metric_for("exact", samples)
    return evaluate(model, samples, metric=metric, predictions=Predictions(path, RUN, samples)).to_dict()  # type: ignore[arg-type]


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(Counting(breaks_at=3), path)
    assert len(path.read_text().splitlines()) == 1
    model = Counting()
    resumed = run(model, path)
    assert model.asked == ["What is 1?"] * 2 + ["What is 2?"] * 2
    assert resumed == run(Counting(breaks_at=0), path) == run(Counting(), tmp_path / "whole.jsonl")
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_line_says_what_was_asked_and_answered(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run(Counting(), path, [replace(SAMPLES[0], accepted=("zero",), kind="count"), *SAMPLES[1:]])
    line = json.loads(path.read_text().splitlines()[0])
    assert {name: line[name] for name in ("sample", "prompt", "images", "kind", "answers", "variants")} == {
        "sample": 0,
        "prompt": "What is 0?",
        "images": ["a.png"],
        "kind": "count",
        "answers": ["0", "zero"],
        "variants": [PRUNED, UNPRUNED],
    }
    assert (line[PRUNED]["text"], line[PRUNED]["points"], line[UNPRUNED]["finish_reason"]) == ("0", 1.0, "end")


def test_more_or_fewer_samples_of_the_same_data_are_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run(Counting(), path, SAMPLES[:1])
    model = Counting(pruned=False)
    path.write_text(path.read_text())
    assert run(Counting(), path)["kinds"]["all"]["asked"] == 3
    assert run(model, path, SAMPLES[:2])["kinds"]["all"]["asked"] == 2 and model.asked == []


def written(path: Path, **changes: Any) -> Path:
    predictions = Predictions(path, RUN, SAMPLES)
    predictions.write(0, SAMPLES[0], {UNPRUNED: SAID}, {UNPRUNED: 0.0})
    if changes:
        data = json.loads(path.read_text())
        path.write_text(json.dumps(data | changes) + "\n")
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert Predictions(written(tmp_path / "out.jsonl"), RUN, SAMPLES).found == {0: {UNPRUNED: SAID}}


@pytest.mark.parametrize(
    ("run", "samples", "words"),
    [
        ({**RUN, "model": "bundle 13"}, SAMPLES, r"is of other models \(bundle 12, not bundle 13\)"),
        ({**RUN, "metric": "vqa"}, SAMPLES, r"is of other metrics \(exact, not vqa\)"),
        ({**RUN, "fit": "pad"}, SAMPLES, r"is of other fit \(None, not pad\)"),
        (RUN, [replace(SAMPLES[0], answer="5")], r"is of other data \(sample 0\)"),
        (RUN, [replace(SAMPLES[0], image=StoredImage("b.parquet row 0", bytes))], r"is of other data"),
    ],
)
def test_lines_of_another_run_are_refused(run: dict[str, str], samples: list[Sample], words: str, tmp_path: Path) -> None:
    path = written(tmp_path / "out.jsonl")
    with pytest.raises(UsageError, match=words) as error:
        Predictions(path, run, samples)
    assert "remove this one" in str(error.value.hint)


@pytest.mark.parametrize(
    "content", ["a note\n", "a note", "[]\n", '{"other": 1', '{"sample": 0}\n', '{"sample": "x", "run": {}}\n']
)
def test_a_file_of_something_else_stays_as_it_is(content: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match="is no prediction"):
        Predictions(path, RUN, SAMPLES)
    assert path.read_text() == content


def test_a_line_that_was_cut_short_is_asked_again(tmp_path: Path) -> None:
    path = written(tmp_path / "out.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    assert set(Predictions(path, RUN, SAMPLES).found) == {0}
    assert path.read_bytes() == whole


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "out.jsonl", "There is no folder")):
        with pytest.raises(UsageError, match=words):
            Predictions(path, RUN, SAMPLES)
