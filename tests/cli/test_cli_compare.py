"""`edgeprune compare`: methods at equal cost over a file of questions, resumable, with what `edgeprune eval` says of each plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edgeprune.cli import main
from edgeprune.plan import KeepPlan

SIZE = ("--image-size", "84x112", "--max-tokens", 3)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def compared(*arguments: object) -> dict[str, Any]:
    result = run("compare", *arguments, *SIZE, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    return {row["name"]: row for row in rows}


def refused(*arguments: object) -> str:
    """Return the one line that a refused command prints."""
    result = run("compare", *SIZE, *arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(lines) == 1, result.output
    return lines[0]


@pytest.fixture
def data(tmp_path: Path, tiny_image: Image.Image) -> Path:
    """Return three questions about one image."""
    return questions(tmp_path / "data.jsonl", tiny_image, "red", "blue", "green")


def questions(path: Path, image: Image.Image, *words: str) -> Path:
    image.save(path.with_name("a.png"))
    lines = [{"image": "a.png", "prompt": f"Is {word} there?", "answer": "yes", "kind": "exists"} for word in words]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_each_row_is_what_eval_says_of_its_plan(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    out, fit = tmp_path / "out", ("--fit", "stretch")
    asked = (tiny_folder, "--data", data, *fit)
    rows = compared(*asked, "--methods", "divprune,fastv,resize", "--keep", "0.75,0.5", "-o", out)
    assert list(rows) == ["none", "divprune-75", "divprune-50", "fastv-75", "fastv-50", "resize-75", "resize-50"]
    for name in ("divprune-50", "fastv-75"):
        alone = json.loads(run("eval", *asked, "--plan", out / "plans" / f"{name}.json", "--max-tokens", 3, "--json").stdout)
        assert rows[name]["report"]["kinds"] == alone["kinds"]
        assert rows[name]["agreement"] == alone["kinds"]["all short answers"]["agreement"]
        assert rows[name]["held"] == pytest.approx(alone["cost"]["pruned"]["visual_kv"])
    assert rows["none"]["scores"] == {"short answers": rows["none"]["report"]["kinds"]["exists"]["unpruned"]}
    assert rows["divprune-50"]["work"] == rows["fastv-50"]["work"] == 0.5
    assert rows["none"]["agreement"] is None and rows["none"]["work"] == rows["none"]["read"] == 1.0
    assert rows["resize-50"]["read"] == rows["resize-50"]["work"] < 0.75
    table = (out / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == list(rows)
    with Image.open(out / "curves.png") as drawn:
        assert drawn.width > 600


def test_a_comparison_goes_on(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = (tiny_folder, "--data", data, "--keep", "0.5", "-o", out)
    first = compared(*asked, "--methods", "divprune")
    answers = out / "answers" / "divprune-50.jsonl"
    lines = answers.read_text().splitlines()
    changed = json.loads(lines[0])
    changed["pruned"]["text"] = "yes"
    answers.write_text("\n".join([json.dumps(changed), lines[1]]) + "\n")
    again = compared(*asked, "--methods", "divprune,uniform")
    assert list(again) == ["none", "divprune-50", "uniform-50"] and again["none"] == first["none"]
    assert again["divprune-50"]["scores"]["short answers"] >= 1 / 3  # the changed line was taken, the missing one asked
    assert json.loads(answers.read_text().splitlines()[2])["pruned"]["text"] == json.loads(lines[2])["pruned"]["text"]
    assert "of other max_tokens (3, not 2)" in refused(*asked, "--methods", "divprune", "--max-tokens", 2)


def test_what_a_method_cannot_do_is_said(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    asked = (tiny_folder, "--data", data, "--limit", 1, "-o", tmp_path / "out")
    rows = compared(*asked, "--methods", "fastv,uniform", "--keep", "0.75,0.01")
    assert rows["fastv-1"]["plan"] is None and "the first sees every token" in rows["fastv-1"]["reason"]
    assert "evs cannot be compared here" in refused(*asked, "--methods", "evs")
    every = compared(tiny_folder, "--data", data, "--limit", 1, "-o", tmp_path / "every", "--keep", "0.5")
    assert {"zspaprune-50", "random-50", "resize-50"} <= set(every) and "plphp-50" not in every
    assert every["evs-50"]["plan"] is None and "takes --fit stretch" in every["resize-50"]["reason"]


def test_methods_that_learn_are_compared(tiny_folder: Path, data: Path, tiny_image: Image.Image, tmp_path: Path) -> None:
    others = questions(tmp_path / "others.jsonl", tiny_image, "black", "white")
    asked = (tiny_folder, "--data", data, "--limit", 1, "--keep", "0.5", "--calibrate-on", others, "-o", tmp_path / "out")
    rows = compared(*asked, "--methods", "plphp,fitprune")
    assert rows["plphp-50"]["work"] == 1.0 and rows["plphp-50"]["held"] == pytest.approx(0.5, abs=0.05)
    mine = tmp_path / "mine.json"
    KeepPlan.from_dict(rows["plphp-50"]["plan"]).save(mine)
    rows = compared(*asked, "--methods", "uniform", "--plan", mine)
    assert list(rows) == ["none", "uniform-50", "mine"] and rows["mine"]["method"] == "plphp"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--methods", "divprun"), "Unknown method 'divprun'. Did you mean divprune?"),
        (("--methods", "plphp"), "Give them: --calibrate-on FILE"),
        (("--methods", "learned"), "Give them: --calibrate-on FILE"),
        (("--methods", "dyrate"), "Give --plan dyrate.json, made by: edgeprune calibrate"),
        (("--methods", "uniform", "--keep", "2"), "2.0 is outside"),
        (("--methods", "uniform", "--keep", "half"), "'half' is no share"),
        (("--methods", "uniform", "--keep", ","), "For example: --keep 0.5,0.25"),
        (("--methods", "uniform,uniform"), "named twice"),
        (("--methods", "uniform", "--plan", "gone.json"), "gone.json"),
    ],
)
def test_mistakes_are_refused(arguments: tuple[str, ...], says: str, tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert says in refused(tiny_folder, "--data", data, "--keep", "0.5", "-o", out, *arguments)
    assert not out.exists()


def test_inputs_and_foreign_folders_are_safe(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    asked = (tiny_folder, "--data", data, "--methods", "uniform")
    (foreign := tmp_path / "foreign").mkdir()
    (foreign / "diary.txt").touch()
    assert "holds no comparison" in refused(*asked, "-o", foreign)
    assert "is an input" in refused(*asked, "-o", data)
    assert "--calibrate-on names the questions" in refused(*asked, "-o", tmp_path / "out", "--calibrate-on", data)


@pytest.mark.slow
def test_a_cluster_gives_the_same(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    asked = (tiny_folder, "--data", data, "--methods", "divprune", "--keep", "0.5")
    here = compared(*asked, "-o", tmp_path / "here")
    there = compared(*asked, "-o", tmp_path / "there", "--ray", "local")
    for name, row in here.items():
        assert (there[name]["scores"], there[name]["agreement"]) == (row["scores"], row["agreement"])
    evaluated = ("eval", tiny_folder, "--data", data, "--plan", tmp_path / "here" / "plans" / "divprune-50.json", "--json")
    alone, spread = (json.loads(run(*evaluated, "--max-tokens", 3, *more).stdout)["kinds"] for more in ((), ("--ray", "local")))
    assert alone == spread == here["divprune-50"]["report"]["kinds"]


def test_learned_is_learned_once_for_all_shares(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for number in range(20):
        name = f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (84, 112, 3), np.uint8)).save(tmp_path / name)
        lines.append(json.dumps({"image": name, "prompt": "Is red there?"}))
    learn_from, out = tmp_path / "learn.jsonl", tmp_path / "out"
    learn_from.write_text("\n".join(lines[:19]))
    cut = ("--methods", "learned", "--keep", "0.75,0.5", "--calibrate-on", learn_from)
    asked = (tiny_folder, "--data", data, "--fit", "stretch", *cut)
    assert "show 19 different images; to learn which tokens matter takes 20" in refused(*asked, "-o", out)
    assert not out.exists()
    learn_from.write_text("\n".join(lines))
    rows = compared(*asked, "-o", out)
    weights = {row["plan"]["cuts"][0]["weights"] for name, row in rows.items() if name != "none"}
    assert list(rows) == ["none", "learned-75", "learned-50"] and len(weights) == 1
    answers = (out / "answers" / "learned-50.jsonl").read_bytes()
    assert compared(*asked, "-o", out) == rows
    assert (out / "answers" / "learned-50.jsonl").read_bytes() == answers
    plan = KeepPlan.load(out / "plans" / "learned-50.json")
    assert plan.cuts[0].keep == 6 and plan.cuts[0].weights is not None and plan.cuts[0].weights.content
