"""LightCompress's YAML where commands take a plan, and its conversion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgeprune.cli import main
from edgeprune.plan import Cut, KeepPlan


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "fastv.yml"
    path.write_text("special: {method: FastV, pruning_loc: 1, rate: 0.75}\n")
    return path


def test_export_takes_the_file_as_a_plan(tiny_folder: Path, settings: Path, tmp_path: Path) -> None:
    result = call("export", tiny_folder, "-o", tmp_path / "b", "--plan", settings, "--image-size", "84x112", "--json")
    assert result.exit_code == 0, result.output
    assert KeepPlan.load(tmp_path / "b" / "plan.json").cuts == (Cut("layer", "fastv", 3, 1),)


def test_inspect_converts_the_file(tiny_folder: Path, settings: Path, tmp_path: Path) -> None:
    result = call("inspect", settings, "--model", tiny_folder, "--image-size", "84x112", "--json")
    assert result.exit_code == 0, result.output
    written = tmp_path / "plan.json"
    written.write_text(result.stdout)
    assert json.loads(result.stdout)["cuts"][0]["keep"] == 3
    assert KeepPlan.load(written).cuts == (Cut("layer", "fastv", 3, 1),)
    assert "fastv @ layer 1: keep 3 of 12" in call("inspect", written).output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "fastv", "--keep", "0.5"), "already says"),
        (("--seed", "3"), "already says"),
        (("--image-size", "84"), "no image size"),
    ],
)
def test_export_refuses_what_the_file_says(
    tiny_folder: Path, settings: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    result = call("export", tiny_folder, "-o", tmp_path / "b", "--plan", settings, *options)
    assert result.exit_code == 2
    assert said in result.stderr


def test_inspect_needs_to_know_the_model(settings: Path, tiny_plan: KeepPlan, tmp_path: Path) -> None:
    result = call("inspect", settings)
    assert result.exit_code == 2
    assert "--model FOLDER" in result.stderr
    (tmp_path / "plan.json").write_text(json.dumps(tiny_plan.to_dict()))
    assert call("inspect", tmp_path / "plan.json", "--model", "tabletop").exit_code == 2
