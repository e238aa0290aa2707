"""The TableTop world: seeded, right by construction, and drawn where it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeprune.errors import UsageError
from edgeprune.runtime.text.tokenizer import TextTokenizer
from edgeprune.tabletop import MODEL_FOLDER
from edgeprune.tabletop.dataset import scenes, write_dataset
from edgeprune.tabletop.drawing import draw_scene
from edgeprune.tabletop.questions import KINDS, ask_all, describe, parse_description
from edgeprune.tabletop.world import SIDE, SIZES, Item, Scene, sample_scene

SCENES = [sample_scene(np.random.default_rng([1, index])) for index in range(60)]


def item_called(scene: Scene, name: str) -> Item:
    return next(item for item in scene.items if item.name == name)


def test_equal_seeds_give_equal_scenes_and_pictures() -> None:
    a, b = (sample_scene(np.random.default_rng(3)) for _ in range(2))
    assert a == b
    assert np.array_equal(np.asarray(draw_scene(a)), np.asarray(draw_scene(b)))
    assert a != sample_scene(np.random.default_rng(4))


def test_a_scene_does_not_depend_on_how_many_are_drawn() -> None:
    assert next(iter(scenes(5, 1))) == next(iter(scenes(5, 40)))
    assert next(iter(scenes(5, 1))) != next(iter(scenes(6, 1)))


def test_names_and_places_are_unique() -> None:
    for scene in SCENES:
        assert len({item.name for item in scene.items}) == len(scene.items)
        places = [item.place for item in scene.items] + [scene.label.place]
        assert len(set(places)) == len(places)


def test_small_items_are_common() -> None:
    sizes = [item.size for scene in SCENES for item in scene.items]
    assert all(sizes.count(size) > 0.35 * len(sizes) for size in SIZES)


def test_every_item_is_drawn_at_its_place() -> None:
    for scene in SCENES[:20]:
        picture = np.asarray(draw_scene(scene), dtype=np.int64)
        without = np.asarray(draw_scene(Scene((), scene.label, scene.gripper, scene.brightness, scene.noise_seed)), np.int64)
        changed = np.abs(picture - without).sum(axis=2) > 40
        inside = np.zeros_like(changed)
        for item in scene.items:
            rows, columns = (slice(int(c - 1.2 * item.radius - 1), int(c + 1.2 * item.radius + 2)) for c in (item.y, item.x))
            assert changed[rows, columns].mean() > 0.1, item
            inside[rows, columns] = True
        assert not (changed & ~inside).any()
    assert draw_scene(SCENES[0]).size == (SIDE, SIDE)


def test_every_kind_is_asked_and_answers_follow_the_scene() -> None:
    seen = set()
    for scene in SCENES:
        for question in ask_all(scene, np.random.default_rng(0)):
            seen.add(question.kind)
            assert _is_right(scene, question.kind, question.prompt.rstrip("?."), question.answer), question
    assert seen == set(KINDS)
    assert len(KINDS) >= 8


def _is_right(scene: Scene, kind: str, prompt: str, answer: str) -> bool:
    # Read the question again, from its words.
    words = prompt.split()
    first, last = " ".join(words[2:4]), " ".join(words[-2:])
    checks: dict[str, Callable[[], bool]] = {
        "colour": lambda: [item.colour for item in scene.items if item.shape == words[-1]] == [answer],
        "shape": lambda: [item.shape for item in scene.items if item.colour == words[-2]] == [answer],
        "size": lambda: answer == item_called(scene, first).size,
        "count": lambda: answer == str(sum(words[2] in (item.colour, item.shape) for item in scene.items)),
        "relation": lambda: _stands(item_called(scene, first), answer, item_called(scene, last)),
        "exists": lambda: (last in {item.name for item in scene.items}) == (answer == "yes"),
        "where": lambda: answer == item_called(scene, last).place,
        "nearest": lambda: answer == min(scene.items, key=scene.distance).name,
        "label": lambda: answer == scene.label.text,
        "describe": lambda: answer == describe(scene),
    }
    return checks[kind]()


def _stands(a: Item, relation: str, b: Item) -> bool:
    return {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[relation]


def test_yes_and_no_are_balanced() -> None:
    answers = [q.answer for scene in SCENES for q in ask_all(scene, np.random.default_rng(0)) if q.kind == "exists"]
    assert answers.count("yes") == answers.count("no")


def test_descriptions_state_every_fact_once() -> None:
    for scene in SCENES:
        assert len(parse_description(describe(scene))) == len(scene.items) + 1


def test_descriptions_are_long_enough_to_matter() -> None:
    codec = TextTokenizer(MODEL_FOLDER / "tokenizer.json")
    lengths = [len(codec.encode(describe(scene))) for scene in SCENES]
    assert min(lengths) >= 20
    assert max(lengths) <= 60


def test_parsing_ignores_order_and_spaces() -> None:
    assert parse_description("blue ball at left,  red cube at top.") == parse_description("red cube at top, blue ball at left")


def test_a_dataset_is_written_whole(tmp_path: Path) -> None:
    count = write_dataset(tmp_path / "data", 3, seed=1)
    assert len((tmp_path / "data" / "dataset.jsonl").read_text().splitlines()) == count
    assert len(list((tmp_path / "data" / "images").iterdir())) == 3

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "more", 3, seed=1, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    with pytest.raises(UsageError):
        write_dataset(tmp_path / "none", 0, seed=1)
