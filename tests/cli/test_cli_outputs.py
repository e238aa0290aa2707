"""Where commands write: an input is never overwritten, an existing file needs --force, and both are said before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.errors import UsageError
from edgeprune.io.files import check_output, is_file, is_folder
from edgeprune.tabletop.dataset import write_dataset

ASK = ("run", "table.bundle", "--image", "0.png", "--prompt", "What is it?", "--max-tokens", "1")
CALIBRATE = ("calibrate", "tabletop", "--data", "scenes/dataset.jsonl")
AUTO = (*CALIBRATE, "--method", "auto", "-o", "new.json")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def place(tiny_bundle: Bundle, tiny_image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "table.bundle").symlink_to(tiny_bundle.path)
    tiny_image.save(tmp_path / "0.png")
    os.link(tmp_path / "0.png", tmp_path / "same.png")
    for name in ("mine.png", "mine.json", "mine.html", "plan.json", "times.json", "part"):
        (tmp_path / name).write_text("mine")
    write_dataset(tmp_path / "scenes", 1, 0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


EXISTING = (
    (*ASK, "--overlay", "mine.png"),
    ("export", "tabletop", "-o", "mine.json"),
    (*CALIBRATE, "--method", "divprune", "--budget", "0.5", "-o", "mine.json"),
    (*AUTO, "--curve", "mine.json"),
    ("merge", "part", "-o", "mine.json"),
    ("profile", "table.bundle", "-o", "mine.json"),
    ("report", "table.bundle", "-o", "mine.html"),
    ("selftest", "table.bundle", "-o", "mine.json"),
    ("bench", "table.bundle", "--plot", "mine.png"),
    ("tabletop", "scenes"),
    ("tabletop", "mine.json"),
)
INPUTS = (
    (*ASK, "--overlay", "0.png"),
    (*ASK, "--overlay", "same.png"),
    (*ASK, "--overlay", "scenes/../0.png"),
    ("export", "tabletop", "--plan", "plan.json", "-o", "plan.json"),
    ("export", "tabletop", "--plan", "plan.json", "-o", "../" + "PLACE"),
    (*CALIBRATE, "--method", "divprune", "--budget", "0.5", "--onto", "plan.json", "-o", "plan.json"),
    (*CALIBRATE, "--method", "divprune", "--budget", "0.5", "-o", "scenes/dataset.jsonl"),
    (*AUTO, "--times", "times.json", "--curve", "times.json"),
    ("merge", "part", "mine.json", "-o", "part"),
    ("report", "plan.json", "-o", "plan.json"),
    ("report", "table.bundle", "--image", "0.png", "--prompt", "x", "-o", "0.png"),
    ("bench", "table.bundle", "--image", "0.png", "--plot", "0.png"),
)
NOWHERE = (
    (*ASK, "--overlay", "none/kept.png"),
    (*CALIBRATE, "--method", "divprune", "--budget", "0.5", "-o", "none/p.json"),
    (*CALIBRATE, "--statistics", "none/s"),
    ("merge", "part", "-o", "none/s"),
    ("profile", "table.bundle", "-o", "none/t.json"),
    ("report", "table.bundle", "-o", "none/r.html"),
    ("selftest", "table.bundle", "-o", "none/s.json"),
    ("bench", "table.bundle", "--plot", "none/b.png"),
)


def contents(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", EXISTING, ids=lambda command: f"{command[0]} {command[-1]}")
def test_an_existing_file_is_not_replaced_unasked(command: tuple[str, ...], place: Path) -> None:
    before = contents(place)
    result = run(*command)
    assert result.exit_code == 2 and "exists already" in result.output and "--force" in result.output, result.output
    assert contents(place) == before


@pytest.mark.parametrize("command", INPUTS, ids=lambda command: f"{command[0]} {command[-1]}")
def test_an_input_is_never_overwritten(command: tuple[str, ...], place: Path) -> None:
    before = contents(place)
    result = run(*(word.replace("PLACE", place.name) for word in command), "--force")
    assert result.exit_code == 2 and "is an input" in result.output, result.output
    assert contents(place) == before


@pytest.mark.parametrize("command", NOWHERE, ids=lambda command: f"{command[0]} {command[-1]}")
def test_a_folder_that_is_not_there_is_said_at_once(command: tuple[str, ...], place: Path) -> None:
    result = run(*command)
    assert result.exit_code == 2 and "mkdir -p none" in result.output, result.output


def test_force_replaces_an_overlay(place: Path) -> None:
    assert run(*ASK, "--overlay", "mine.png", "--force").exit_code == 0
    with Image.open("mine.png") as drawn:
        assert drawn.width > 112
    assert "unknown file extension" in run(*ASK, "--overlay", "kept.txt").output
    assert "is a folder" in run(*ASK, "--overlay", "scenes", "--force").output


def test_places_that_cannot_be_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for output in (tmp_path / "file" / "p.json", tmp_path / "loop", tmp_path / "loop" / "p", Path(), Path("/")):
        with pytest.raises(UsageError):
            check_output(output, force=False)
        with pytest.raises(UsageError):
            check_output(output, force=False, folder=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UsageError, match="Not allowed to write"):
        check_output(tmp_path / "p.json", force=False)


def test_names_that_no_file_can_have_are_no_files() -> None:
    for name in ("a" * 5000, "a\0b", "\udcff"):
        assert not is_file(Path(name)) and not is_folder(Path(name))
