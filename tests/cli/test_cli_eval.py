"""`edgeprune eval`: metrics, published files, several images and videos, and predictions that a second run goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.cli import main

EXACT = ("--fit", "stretch", "--max-tokens", 2)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["eval", *(str(argument) for argument in arguments)])


def report(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(*arguments: object) -> str:
    """Return the one line that a refused command prints."""
    result = run(*arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(lines) == 1, result.output
    return lines[0]


@pytest.fixture
def data(tmp_path: Path, tiny_image: Image.Image) -> Path:
    """Return three questions about one image, with options and ten answers."""
    tiny_image.save(tmp_path / "a.png")
    sample = {"image": "a.png", "answer": ["yes"] * 10, "options": ["yes", "no"], "kind": "exists"}
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({**sample, "prompt": f"Is {word} there?"}) for word in ("red", "blue", "green")))
    return path


@pytest.mark.parametrize("metric", ["exact", "vqa", "anls", "choice", "yes-no", "facts", "cider"])
def test_each_metric_scores_a_bundle(metric: str, tiny_bundle: Bundle, data: Path) -> None:
    found = report(tiny_bundle.path, "--data", data, "--metric", metric, *EXACT)
    assert found["metric"] == metric and found["kinds"]["all"]["asked"] == 3
    assert {"pruned", "unpruned"} <= set(found["kinds"]["exists"])


def test_an_evaluation_goes_on(tiny_bundle: Bundle, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    asked = (tiny_bundle.path, "--data", data, *EXACT, "--predictions", out)
    report(*asked, "--limit", 1)
    first = out.read_bytes()
    whole = report(*asked)
    assert out.read_bytes().startswith(first) and len(out.read_text().splitlines()) == 3
    assert report(*asked) == whole
    assert "of other metrics" in refused(*asked, "--metric", "anls")
    assert "of other max_tokens (2, not 3)" in refused(*asked, "--max-tokens", 3)
    data.write_text(data.read_text().replace("blue", "pink"))
    assert "of other data (sample 1)" in refused(*asked)
    assert "is an input" in refused(*asked[:-1], data)


def test_predictions_are_of_one_bundle(altered_bundle: Path, data: Path, tmp_path: Path) -> None:
    asked = ("--data", data, *EXACT, "--predictions", tmp_path / "out.jsonl")
    report(altered_bundle, *asked, "--limit", 1)
    manifest = altered_bundle / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert "of other models" in refused(altered_bundle, *asked)


def test_a_model_has_its_plan_in_predictions(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    out = ("--predictions", tmp_path / "out.jsonl")
    asked = (tiny_folder, "--data", data, "--limit", 1, "--image-size", "84x112", *EXACT, "--device", "cpu", *out)
    assert report(*asked)["kinds"]["exists"]["asked"] == 1
    assert "of other models" in refused(*asked, "--method", "fastv", "--keep", "0.5", "--layer", 1)


def test_published_files_are_scored_by_their_metric(tiny_bundle: Bundle, tmp_path: Path, tiny_image: Image.Image) -> None:
    (tmp_path / "val2014").mkdir()
    tiny_image.save(tmp_path / "val2014" / "a.png")
    pope = tmp_path / "coco_pope_random.json"
    lines = [
        {"question_id": n, "image": "a.png", "text": "Is there a cup?", "label": label} for n, label in enumerate(("yes", "no"))
    ]
    pope.write_text("\n".join(map(json.dumps, lines)))
    asked = (tiny_bundle.path, "--data", pope, "--format", "pope", *EXACT)
    assert "names the image a.png" in refused(*asked)
    found = report(*asked, "--images", tmp_path / "val2014")
    assert found["metric"] == "yes-no" and "yes_ratio" in found["kinds"]["all"]
    assert "ten people" in refused(*asked, "--images", tmp_path / "val2014", "--metric", "vqa")


def test_questions_without_an_image_are_counted(tiny_bundle: Bundle, tmp_path: Path, tiny_image: Image.Image) -> None:
    (tmp_path / "images" / "test" / "2").mkdir(parents=True)
    tiny_image.save(tmp_path / "images" / "test" / "2" / "image.png")
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 0, "hint": "", "split": "test", "subject": "social science"}
    problems = {"1": {**problem, "image": None}, "2": {**problem, "image": "image.png"}}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    result = run(tiny_bundle.path, "--data", tmp_path / "problems.json", "--format", "scienceqa", *EXACT)
    assert result.exit_code == 0 and "questions without an image, left out: 1" in result.stderr
    assert "metric: choice" in result.stdout


def test_several_images_of_a_sample(tiny_bundle: Bundle, data: Path) -> None:
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("\n".join(json.dumps({**line, "image": ["a.png"] * 2}) for line in lines))
    one, two = (report(tiny_bundle.path, "--data", data, *EXACT, "--limit", n) for n in (1, 2))
    assert (one["kinds"]["exists"]["asked"], two["kinds"]["exists"]["asked"]) == (1, 2)


def test_the_frames_of_a_video(data: Path, tiny_image: Image.Image) -> None:
    from tiny_qwen2_vl import folder

    (data.parent / "model").mkdir()
    model = folder(data.parent / "model")
    tiny_image.rotate(180).save(data.parent / "b.png")
    line = json.loads(data.read_text().splitlines()[0])
    data.write_text(json.dumps({**line, "image": ["a.png", "a.png", "b.png", "b.png"]}))
    asked = (model, "--data", data, *EXACT, "--image-size", "84x112", "--frames", 4, "--method", "evs", "--keep", 0.5)
    found = report(*asked)
    assert found["kinds"]["exists"]["asked"] == 1 and found["cost"]["pruned"]["visual_kv"] < 1
    data.write_text(json.dumps({**line, "image": ["a.png", "b.png"]}))
    assert "data.jsonl:1: The bundle takes" in refused(*asked)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "cuda"), "is a bundle, which torch does not run"),
        (("--split", "test"), "--split is for published files"),
        (("--images", "a"), "--images is for published files"),
        (("--metric", "bleu"), "'bleu' is not one of"),
        (("--format", "gqa"), "no 'question'"),
    ],
)
def test_what_does_not_fit_is_refused(options: tuple[str, ...], words: str, tiny_bundle: Bundle, data: Path) -> None:
    result = run(tiny_bundle.path, "--data", data, *options)
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.output


def test_devices_are_those_of_torch(tiny_folder: Path, data: Path) -> None:
    assert "Unknown device 'orin'" in refused(tiny_folder, "--data", data, "--device", "orin")
