"""The data format of users, its errors by line, and the scoring of answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeprune.calibration.data.samples import Sample, read_samples, score
from edgeprune.errors import UsageError

GOOD = {"image": "a.png", "prompt": "What?", "answer": "red", "kind": "colour"}


def write(folder: Path, *lines: object) -> Path:
    (folder / "a.png").write_bytes(b"")
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_samples_are_read_relative_to_the_file(tmp_path: Path) -> None:
    samples = read_samples(write(tmp_path, GOOD, "", {k: v for k, v in GOOD.items() if k != "kind"}))
    assert samples == [Sample(tmp_path / "a.png", "What?", "red", "colour"), Sample(tmp_path / "a.png", "What?", "red", "")]
    assert len(read_samples(tmp_path / "data.jsonl", limit=1)) == 1


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", "data.jsonl:2 is not JSON"),
        ("[]", "data.jsonl:2 is not a JSON object"),
        ({"image": "a.png", "prompt": "What?"}, "data.jsonl:2 has no text 'answer'"),
        ({**GOOD, "prompt": 3}, "data.jsonl:2 has no text 'prompt'"),
        ({**GOOD, "image": "b.png"}, "data.jsonl:2 names the image b.png"),
    ],
)
def test_the_line_at_fault_is_named(bad: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        read_samples(write(tmp_path, GOOD, bad))


def test_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no samples"):
        read_samples(write(tmp_path, ""))
    with pytest.raises(UsageError, match="Cannot read"):
        read_samples(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="limit"):
        read_samples(write(tmp_path, GOOD), limit=0)


@pytest.mark.parametrize(("text", "right"), [("red", 1), (" Red. ", 1), ("red!", 1), ("reddish", 0), ("", 0), ("blue", 0)])
def test_short_answers_match_exactly(text: str, right: int) -> None:
    assert score(Sample(Path(), "What?", "red", "colour"), text).correct == right


def test_descriptions_are_scored_by_their_facts() -> None:
    sample = Sample(Path(), "Describe.", "red cube at top, blue ball at left, label K7 at bottom.", "describe")
    points = score(sample, "blue ball at left, red cube at middle.")
    assert (points.correct, points.total) == (1, 2)
    assert points.recall == pytest.approx(1 / 3)
    assert score(sample, "").correct == 0
