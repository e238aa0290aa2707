"""The world of photographs, on made-up stamps: what is held out, and whether questions are true of what was drawn."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from repository import ROOT

from edgeprune.errors import UsageError
from edgeprune.tabletop.questions import parse_description

HERE = ROOT / "examples" / "train_tabletop"
STAMPS = {  # path: colour, and the first line of its text
    "animals/mammals/dogs/dingo": ((200, 60, 60), "A dingo."),
    "food/fruit/pineapple": ((60, 200, 60), "A pineapple."),
    "vehicles/masstransit/green_korean_bus": ((60, 60, 200), "A green bus."),
    "animals/mammals/dogs/dog": ((200, 60, 60), "A dog."),  # held out
    "animals/birds/ostrich": ((10, 200, 200), "An ostrich."),  # held out, and so is its name
}
SCENES = 60


@pytest.fixture(scope="module", autouse=True)
def _scripts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        yield


@pytest.fixture(scope="module")
def world() -> Any:
    return import_module("photographs")


@pytest.fixture(scope="module")
def asking() -> Any:
    return import_module("photo_questions")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with stamps: a disc of one colour each, with a wide transparent border."""
    root = tmp_path_factory.mktemp("stamps")
    disc = np.hypot(*(np.mgrid[:80, :80] - 40.0)) < 20
    for path, (colour, text) in STAMPS.items():
        file = root / f"{path}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((80, 80, 4), np.uint8)
        pixels[disc] = (*colour, 255)
        Image.fromarray(pixels).save(file)
        file.with_suffix(".txt").write_text(f"{text}\nde.utf8=…\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def photographs(world: Any, folder: Path) -> Any:
    return world.load_photographs(folder)


def test_pictures_are_cut_to_what_is_visible(photographs: Any) -> None:
    assert len(photographs.pictures) == len(STAMPS)
    for picture in photographs.pictures:
        assert picture.image.size == (39, 39)
        assert np.allclose(picture.mean, STAMPS[picture.entry.path][0], atol=1)


def test_what_is_held_out_is_fixed_and_never_trained_on(photographs: Any) -> None:
    stamps = import_module("stamps")
    entries = stamps.catalogue()
    assert len({entry.path for entry in entries}) == len(entries)
    held = [entry for entry in entries if entry.split == stamps.HELD_OUT]
    trained = {entry.name for entry in entries if entry.split == stamps.TRAIN}
    kinds = {entry.kind for entry in entries if entry.split == stamps.TRAIN}
    assert 0.13 < len(held) / len(entries) < 0.17
    assert all((entry.name in trained) is not entry.new and entry.kind in kinds for entry in held)
    assert {picture.entry.path for picture in photographs.of(stamps.TRAIN)} == set(list(STAMPS)[:3])
    assert [picture.entry.new for picture in photographs.of(stamps.HELD_OUT)] == [True, False]
    with pytest.raises(UsageError, match="no split 'test'"):
        photographs.of("test")


def test_a_seed_gives_the_same_scene_and_questions(world: Any, photographs: Any) -> None:
    first, again, other = (world.sample(np.random.default_rng(seed), photographs) for seed in (5, 5, 6))
    assert first[0].size == (world.SIDE, world.SIDE)
    assert first[0].tobytes() == again[0].tobytes()
    assert first[1] == again[1]
    assert first[0].tobytes() != other[0].tobytes()


def drawn(world: Any, photographs: Any, split: str) -> Iterator[tuple[Any, Image.Image, list[Any]]]:
    for seed in range(SCENES):
        rng = np.random.default_rng(seed)
        scene, image = world.draw(rng, photographs, split)
        yield scene, image, import_module("photo_questions").ask(scene, rng)


def test_things_are_drawn_where_the_scene_says(world: Any, photographs: Any) -> None:
    for scene, image, _ in drawn(world, photographs, "train"):
        pixels = np.asarray(image, np.float32)
        for thing in scene.things:
            row, column = (1, 1) if scene.large else (thing.row, thing.column)
            y, x = (round(world.SIDE * (12 + 56 * (at + 0.5)) / 192) for at in (row, column))
            seen = pixels[y - 4 : y + 4, x - 4 : x + 4].mean(axis=(0, 1))
            assert np.abs(seen - thing.picture.mean).max() < 0.16 * 255


def test_questions_are_true_of_the_scene(world: Any, asking: Any, photographs: Any) -> None:
    words = {asking._plural(word): word for entry in import_module("stamps").catalogue() for word in (entry.name, entry.kind)}
    kinds: set[str] = set()
    for scene, _, questions in drawn(world, photographs, "train"):
        places = {} if scene.large else {thing.place: thing.entry for thing in scene.things}
        assert len({question.prompt for question in questions}) == len(questions) <= asking.QUESTIONS
        for question in questions:
            kinds.add(question.kind)
            if found := re.match(r"How many (.+?) (are|do)", question.prompt):
                plural = found[1]
                called = [thing for thing in scene.things if plural == "things" or thing.entry.is_called(words[plural])]
                assert question.answer == str(len(called))
            elif found := re.match(r"Where (?:is|are) (?:the )?(.+)\?", question.prompt):
                assert [place for place, entry in places.items() if entry.is_called(found[1])] == [question.answer]
            elif found := re.match(r"Is there (?:an?|any) (.+)\?", question.prompt):
                called = [thing for thing in scene.things if thing.entry.is_called(found[1])]
                assert question.answer == ("yes" if called else "no")
            elif found := re.match(r"What is (?:in|on|at) the (?!picture)(.+)\?", question.prompt):
                assert question.answer == places[found[1]].name
            elif question.kind == "photo: describe" and not scene.large:
                assert parse_description(question.answer) == {f"{entry.name} at {place}" for place, entry in places.items()}
    assert kinds == set(asking.PHOTO_KINDS) - {"photo: new kind"}


def test_names_that_training_never_has_are_not_asked_for(world: Any, asking: Any, photographs: Any) -> None:
    asked = [question for *_, questions in drawn(world, photographs, "held-out") for question in questions]
    assert all("ostrich" not in f"{question.prompt} {question.answer}" for question in asked)
    assert {question.answer for question in asked if question.kind == "photo: new kind"} == {"bird"}
    assert {question.answer for question in asked if question.kind == "photo: at"} == {"dog"}


def test_nothing_is_asked_that_is_a_matter_of_opinion(asking: Any) -> None:
    for name, kind, word in (
        ("fire truck", "vehicle", "truck"),
        ("rubber duck", "toy", "bird"),
        ("tomato", "vegetable", "fruit"),
        ("donkey", "animal", "horse"),
    ):
        assert asking._is_disputed(name, kind, word)
    assert not asking._is_disputed("dog", "animal", "horse")


def test_a_pack_takes_the_place_of_the_folder(world: Any, folder: Path, photographs: Any, tmp_path: Path) -> None:
    script, pack = [sys.executable, str(HERE / "photographs.py")], tmp_path / "photographs.zip"
    subprocess.run([*script, folder, "--pack", pack], check=True, cwd=tmp_path)
    packed = world.load_photographs(pack)
    assert [picture.entry for picture in packed.pictures] == [picture.entry for picture in photographs.pictures]
    subprocess.run([*script, pack, "out", "--scenes", "5", "--seed", "1"], check=True, cwd=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "out" / "dataset.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["image"] for line in lines} == {f"images/{index:06}.png" for index in range(5)}
    assert all((tmp_path / "out" / line["image"]).is_file() for line in lines)
    assert {line["kind"] for line in lines} <= {"describe", *world.PHOTO_KINDS}


def test_what_is_no_stamps_is_refused(world: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none of the stamps"):
        world.load_photographs(tmp_path)
    with pytest.raises(UsageError, match="neither a folder"):
        world.load_photographs(tmp_path / "absent")
