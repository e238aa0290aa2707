"""The data format of users, its errors by line, and the scoring of answers."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from edgeprune.calibration.data.samples import BadSampleError, Sample, StoredImage, asked_digest, read_samples, score, split
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
    assert (points.correct, points.stated, points.true) == (1, 2, 3)
    assert (points.precision, points.recall, points.f1) == pytest.approx((1 / 2, 1 / 3, 2 / 5))


def test_silence_costs_recall() -> None:
    sample = Sample(Path(), "Describe.", "red cube at top, blue ball at left.", "describe")
    brief, silent = score(sample, "red cube at top."), score(sample, "")
    assert (brief.precision, brief.recall, brief.f1) == pytest.approx((1, 1 / 2, 2 / 3))
    assert (silent.precision, silent.recall, silent.f1) == (0, 0, 0)
    both = brief + silent
    assert (both.precision, both.recall, both.f1) == pytest.approx((1, 1 / 4, 2 / 5))


def test_a_short_answer_is_right_or_wrong() -> None:
    right, wrong = (score(Sample(Path(), "What?", "red", "colour"), text) for text in ("red", "blue"))
    assert (right + wrong).f1 == (right + wrong).precision == (right + wrong).recall == 0.5


def test_what_others_write_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    lines = [{**GOOD, "answer": ["red", "crimson"]}, {**GOOD, "answer": 3}, {**GOOD, "image": ["a.png", "a.png"]}]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, lines)).encode())
    several, number, pair = read_samples(path)
    assert (several.answer, several.accepted, number.answer) == ("red", ("crimson",), "3")
    assert pair.images == (tmp_path / "a.png", tmp_path / "a.png") and pair.where == f"{path}:3"
    assert [score(several, text).correct for text in ("Red.", "crimson", "blue")] == [1, 1, 0]


BAD: list[tuple[object, str]] = [
    ({**GOOD, "prompt": " "}, "an empty 'prompt'"),
    ({**GOOD, "image": 3}, "no text 'image'"),
    ({**GOOD, "image": []}, "no text 'image'"),
    ({**GOOD, "image": "http://host/a.png"}, "names the address"),
    ({**GOOD, "answer": []}, "no text 'answer'"),
    ({**GOOD, "answer": True}, "no text 'answer'"),
    ({**GOOD, "kind": 1}, "no text 'kind'"),
    ('{"image": "a.png", "prompt": "\\ud800", "answer": "x"}', "half of a surrogate pair in 'prompt'"),
    ({**GOOD, "image": "a" * 5000}, "which is not there"),
    ("[" * 100_000, "is not JSON"),
]


@pytest.mark.parametrize(("bad", "words"), BAD, ids=[words for _, words in BAD])
def test_a_bad_line_is_named_or_skipped(bad: object, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, bad, GOOD)
    with pytest.raises(BadSampleError, match=f"data.jsonl:2.*{words}"):
        read_samples(path)
    skipped: list[BadSampleError] = []
    assert len(read_samples(path, on_bad=skipped.append)) == 2
    assert [words in error.message for error in skipped] == [True]
    assert len(read_samples(path, limit=2, on_bad=skipped.append)) == 2


def test_bytes_that_are_no_text_spoil_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    path.write_bytes(path.read_bytes() + b'\n{"image": "\xff"}\n' + path.read_bytes())
    with pytest.raises(BadSampleError, match=r"data.jsonl:2 is not UTF-8 \(byte 12\)"):
        read_samples(path)
    assert len(read_samples(path, on_bad=lambda error: None)) == 2


def test_a_folder_is_answered_with_the_file_in_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Give a file of JSON lines"):
        read_samples(tmp_path)
    path = write(tmp_path, GOOD)
    with pytest.raises(UsageError, match=f"--data {path}"):
        read_samples(tmp_path)


@pytest.mark.parametrize(("most", "sizes"), [(12, [6, 6]), (6, [6, 6]), (4, [9, 3]), (3, [9, 3])])
def test_those_who_judge_saw_other_images(most: int, sizes: list[int]) -> None:
    samples = [Sample((Path(f"{number // 3}.png"),), f"question {number}", "answer") for number in range(12)]
    learned_from, judging = split(samples, most)
    assert [len(learned_from), len(judging)] == sizes
    assert {each.images for each in learned_from} & {each.images for each in judging} == set()


def test_of_one_image_samples_are_split() -> None:
    samples = [Sample((Path("0.png"),), f"question {number}", "answer") for number in range(3)]
    assert [len(part) for part in split(samples, 120)] == [2, 1]


def test_samples_are_known_again_by_what_is_in_their_images(tmp_path: Path) -> None:
    def asked(folder: str) -> str:
        return asked_digest([Sample(tmp_path / folder / name, "What is it?", "") for name in ("a.png", "gone.png")])

    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.png").write_bytes(b"an image")
    first = asked("here")
    shutil.copytree(tmp_path / "here", tmp_path / "moved")
    assert asked("moved") == first
    (tmp_path / "here" / "a.png").write_bytes(b"AN IMAGE")  # as long as before
    assert asked("here") != first
    stored = [Sample(StoredImage("a.parquet row 0", partial(bytes, held)), "What is it?", "") for held in (b"one", b"two")]
    assert asked_digest(stored[:1]) != asked_digest(stored[1:])
