"""Published files of six benchmarks, made up small in the same form, and what is said about files of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeprune.calibration.data.formats import Published, format_names, read_format
from edgeprune.calibration.data.samples import BadSampleError, Sample
from edgeprune.cli.options import FORMATS
from edgeprune.errors import MissingExtraError, UsageError
from edgeprune.runtime.media.images import read_image

IN_A_WORD = "Answer the question using a single word or phrase."
BY_LETTER = "Answer with the option's letter from the given choices directly."
POPE = {"question_id": 1, "image": "COCO_val2014_000000000001.jpg", "text": "Is there a dog in the image?", "label": "yes"}
GQA = {"imageId": "n1", "question": "Is it red?", "answer": "no", "types": {"structural": "verify", "semantic": "attr"}}
TEXTVQA = {"image_id": "ab", "question_id": 3, "question": "what is the brand?", "answers": ["dakota"] * 7 + ["no"] * 3}
SCIENCE: dict[str, Any] = {
    "1": {"question": "Which is it?", "choices": ["a cat", "a dog"], "answer": 1, "hint": "", "image": None, "split": "test"},
    "7": {"question": "Which?", "choices": ["x", "y"], "answer": 0, "hint": "Look.", "image": "image.png", "split": "test"},
    "8": {"question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": "", "image": "image.png", "split": "train"},
}
COCO = {
    "images": [{"id": 5, "file_name": "000000000005.jpg"}, {"id": 6, "file_name": "000000000006.jpg"}],
    "annotations": [
        {"image_id": 6, "id": 1, "caption": "A cat."},
        {"image_id": 5, "id": 2, "caption": "A dog."},
        {"image_id": 6, "id": 3, "caption": "One cat."},
    ],
}
FILES: dict[str, tuple[Any, str]] = {
    "pope": (POPE, POPE["image"]),  # type: ignore[dict-item]
    "gqa": ({"201": GQA}, "n1.jpg"),
    "textvqa": ({"dataset_name": "textvqa", "data": [TEXTVQA]}, "ab.jpg"),
    "scienceqa": ({key: SCIENCE[key] for key in ("1", "7")}, "test/7/image.png"),
    "coco-captions": (COCO, "000000000006.jpg"),
}


def picture(path: Path, grey: int = 9) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(path, format="PNG")
    return path


def read(folder: Path, name: str, content: Any = None, **options: Any) -> Published:
    data, image = FILES[name]
    picture(folder / "images" / image)
    if name == "coco-captions":
        picture(folder / "images" / "000000000005.jpg")
    path = folder / "data.json"
    path.write_text(json.dumps(data if content is None else content))
    return read_format(name, path, **options)


def only(published: Published) -> Sample:
    assert len(published.samples) == 1
    return published.samples[0]


def test_every_format_is_offered() -> None:
    assert format_names() == FORMATS


def test_pope_in_lines_and_as_a_list(tmp_path: Path) -> None:
    found = only(read(tmp_path, "pope", [POPE]))
    assert (found.prompt, found.answer) == (f"Is there a dog in the image?\n{IN_A_WORD}", "yes")
    assert found.images == (tmp_path / "images" / POPE["image"],)  # type: ignore[operator]
    (tmp_path / "data.json").write_text(f"{json.dumps(POPE)}\n\n{json.dumps({**POPE, 'label': 'no'})}\n")
    published = read_format("pope", tmp_path / "data.json")
    assert [(each.answer, each.where) for each in published.samples] == [
        ("yes", f"{tmp_path / 'data.json'}:1"),
        ("no", f"{tmp_path / 'data.json'}:3"),
    ]
    assert published.metric == "yes-no" and len(read_format("pope", tmp_path / "data.json", limit=1).samples) == 1


def test_gqa(tmp_path: Path) -> None:
    published = read(tmp_path, "gqa")
    found = only(published)
    assert (found.prompt, found.answer, found.kind, published.metric) == (f"Is it red?\n{IN_A_WORD}", "no", "verify", "exact")


def test_textvqa_has_ten_answers(tmp_path: Path) -> None:
    published = read(tmp_path, "textvqa")
    assert only(published).answers == ("dakota",) * 7 + ("no",) * 3 and published.metric == "vqa"


def test_scienceqa_asks_what_has_an_image(tmp_path: Path) -> None:
    published = read(tmp_path, "scienceqa")
    found = only(published)
    assert found.prompt == f"Context: Look.\nWhich?\nA. x\nB. y\n{BY_LETTER}"
    assert (found.answer, found.options, published.without_image, published.metric) == ("A", ("x", "y"), 1, "choice")


def test_one_of_several_splits_is_chosen(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "train" / "8" / "image.png")
    with pytest.raises(UsageError, match="has the splits test, train") as error:
        read(tmp_path, "scienceqa", SCIENCE)
    assert error.value.hint == "Choose one: --split test"
    assert only(read(tmp_path, "scienceqa", SCIENCE, split="train")).answer == "B"
    with pytest.raises(UsageError, match="no split 'val'"):
        read(tmp_path, "scienceqa", SCIENCE, split="val")


def test_the_captions_of_an_image_come_together(tmp_path: Path) -> None:
    published = read(tmp_path, "coco-captions")
    assert [each.answers for each in published.samples] == [("A dog.",), ("A cat.", "One cat.")]
    assert published.metric == "cider"


WRONG: dict[str, tuple[str, Any, str]] = {
    "a file of another format": ("textvqa", [POPE], "data.json .0. has no 'answers'"),
    "another kind": ("gqa", {"1": {**GQA, "question": 3}}, "a int as 'question'"),
    "no answers": ("textvqa", {"data": [{**TEXTVQA, "answers": []}]}, "no texts in 'answers'"),
    "no such choice": ("scienceqa", {"7": {**SCIENCE["7"], "answer": 2}}, "answer 2 of 2 choices"),
    "no object": ("pope", [3], "is not a JSON object"),
    "a missing image": ("gqa", {"1": {**GQA, "imageId": "n2"}}, "names the image n2.jpg, which is not in"),
    "an image without captions": ("coco-captions", {**COCO, "annotations": []}, "has no 'answer'"),
    "nothing": ("textvqa", {"data": []}, "no samples of the format textvqa"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(case: str, tmp_path: Path) -> None:
    name, content, words = WRONG[case]
    with pytest.raises(UsageError, match=words) as error:
        read(tmp_path, name, content)
    assert error.value.hint and "\n" not in error.value.message


def test_bad_records_are_left_out(tmp_path: Path) -> None:
    skipped: list[BadSampleError] = []
    found = only(read(tmp_path, "pope", [{**POPE, "label": None}, POPE], on_bad=skipped.append))
    assert found.answer == "yes" and "data.json [0] has no 'label' or 'answer'" in skipped[0].message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, options, words in (
        ("none.json", {}, "Cannot read"),
        ("text.json", {}, "neither JSON nor lines"),
        ("folder", {}, "no parquet files"),
        ("text.json", {"images": tmp_path / "none"}, "no folder"),
    ):
        (tmp_path / "text.json").write_text("a\nb")
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match=words):
            read_format("pope", tmp_path / name, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no format 'vqav2'"):
        read_format("vqav2", tmp_path)


# parquet, as the datasets library writes it


def encoded(grey: int, folder: Path) -> dict[str, Any]:
    path = picture(folder / f"{grey}.png", grey)
    return {"bytes": path.read_bytes(), "path": path.name}


def write(path: Path, rows: list[dict[str, Any]], pictures: tuple[str, ...] = ("image",)) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {name: pyarrow.array([row[name] for row in rows], image if name in pictures else None) for name in rows[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def pixel(sample: Sample, number: int = 0) -> int:
    return int(np.asarray(read_image(sample.images[number]))[0, 0, 0])


def test_images_inside_parquet_are_read_when_asked_for(tmp_path: Path) -> None:
    rows = [
        {"question_id": str(n), "question": f"Is it {n}?", "answer": "yes", "category": "random", "image": encoded(n, tmp_path)}
        for n in range(5)
    ]
    published = read_format("pope", write(tmp_path / "data" / "test-00000-of-00001.parquet", rows).parent)
    assert [pixel(each) for each in published.samples] == [0, 1, 2, 3, 4]
    assert pixel(published.samples[0]) == 0  # of a group of rows that was left
    assert {each.kind for each in published.samples} == {"random"} and "row 3 image" in str(published.samples[3].image)
    write(tmp_path / "data" / "dev-00000-of-00001.parquet", rows[:1])
    assert len(read_format("pope", tmp_path / "data", split="dev").samples) == 1
    with pytest.raises(UsageError, match="has the splits dev, test"):
        read_format("pope", tmp_path / "data")


def test_gqa_takes_images_from_other_parquet_files(tmp_path: Path) -> None:
    data = write(tmp_path / "questions" / "testdev-00000-of-00001.parquet", [{"id": "201", **GQA}])
    images = write(tmp_path / "pictures" / "testdev-00000-of-00001.parquet", [{"id": "n1", "image": encoded(7, tmp_path)}])
    found = only(read_format("gqa", data, images=images.parent))
    assert pixel(found) == 7 and found.kind == "verify"


def mmmu(folder: Path, **changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {"id": "validation_Art_1", "question": "<image 2> or <image 1>?", "options": "['a <image 3>', 'b']"}
    whole |= {"answer": "B", "question_type": "multiple-choice", "image_4": None}
    whole |= {f"image_{number}": encoded(number, folder) for number in (1, 2, 3)}
    return whole | changes


def write_mmmu(folder: Path, *rows: dict[str, Any]) -> Path:
    return write(folder / "Art" / "validation-00000-of-00001.parquet", list(rows), tuple(f"image_{n}" for n in range(1, 5)))


def test_mmmu_shows_the_images_that_are_named(tmp_path: Path) -> None:
    number = mmmu(tmp_path, question="How many in <image 1>?", options="[]", answer="['24', '24.0']", question_type="open")
    choice, opened = read_format("mmmu", write_mmmu(tmp_path, mmmu(tmp_path), number)).samples
    assert choice.prompt == f"<image 2> or <image 1>?\nA. a <image 3>\nB. b\n\n{BY_LETTER}"
    assert (choice.answer, choice.options, choice.kind) == ("B", ("a <image 3>", "b"), "multiple choice")
    assert [pixel(choice, place) for place in range(3)] == [1, 2, 3]
    assert (opened.answers, opened.options, opened.kind, len(opened.images)) == (("24", "24.0"), (), "open", 1)
    assert opened.prompt == f"How many in <image 1>?\n\n{IN_A_WORD}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answer": "?"}, "those of the test split are not published"),
        ({"options": "no list"}, "no list in 'no list'"),
        ({"question": "<image 4>?"}, "has no 'image_4'"),
        ({"question": "Which?", "options": "['a', 'b']"}, "shows no image"),
    ],
)
def test_mmmu_that_cannot_be_asked(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadSampleError, match=words):
        read_format("mmmu", write_mmmu(tmp_path, mmmu(tmp_path, **changes)))


def test_a_damaged_parquet_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="as parquet"):
        read_format("pope", tmp_path / "a.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.errors._is_installed", lambda package: False)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtraError, match="pyarrow not installed") as error:
        read_format("pope", tmp_path / "a.parquet")
    assert "[parquet]" in str(error.value.hint)
