"""Questions about a TableTop scene, each with its one correct answer, and a parser for descriptions.

Descriptions are scored by the facts that they state, not as strings: `parse_description` converts the model's text and the
reference into sets of facts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from edgeprune.tabletop.world import COLOURS, SHAPES, Item, Scene

DESCRIBE = "describe"
DESCRIBE_PROMPT = "Describe the scene."
_NEAREST_MARGIN = 16.0  # pixels by which the nearest item must be closer than the second


@dataclass(frozen=True)
class Question:
    """A question: its `kind`, the `prompt`, and the correct `answer`."""

    kind: str
    prompt: str
    answer: str


def ask_all(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Return every question that the scene supports; the generator draws the absent items of "is there" questions."""
    return [question for ask in _ASKERS.values() for question in ask(scene, rng)]


def ask_one(scene: Scene, rng: np.random.Generator, kind: str) -> Question | None:
    """Return one question of a kind, or None if the scene supports none (for example, no clear nearest item)."""
    candidates = list(_ASKERS[kind](scene, rng))
    return candidates[int(rng.integers(len(candidates)))] if candidates else None


def describe(scene: Scene) -> str:
    """Return the reference description: items in reading order, then the label."""
    stated = [f"{item.name} at {item.place}" for item in scene.items]
    return ", ".join([*stated, f"label {scene.label.text} at {scene.label.place}"]) + "."


def parse_description(text: str) -> set[str]:
    """Return the facts of a description, one per clause with normalised spaces, such as "red cube at top left"."""
    return {clause for part in re.split(r"[,.]", text) if (clause := " ".join(part.split()))}


def _colour(scene: Scene, _: np.random.Generator) -> Iterator[Question]:
    for item in _unique(scene, "shape"):
        yield Question("colour", f"What colour is the {item.shape}?", item.colour)


def _shape(scene: Scene, _: np.random.Generator) -> Iterator[Question]:
    for item in _unique(scene, "colour"):
        yield Question("shape", f"What shape is the {item.colour} object?", item.shape)


def _size(scene: Scene, _: np.random.Generator) -> Iterator[Question]:
    for item in scene.items:
        yield Question("size", f"Is the {item.name} small or large?", item.size)


def _count(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for word in sorted({item.colour for item in scene.items} | {str(rng.choice(COLOURS))}):
        yield Question("count", f"How many {word} objects are there?", str(sum(i.colour == word for i in scene.items)))
    for word in sorted({item.shape for item in scene.items} | {str(rng.choice(SHAPES))}):
        yield Question("count", f"How many {word} objects are there?", str(sum(i.shape == word for i in scene.items)))


def _relation(scene: Scene, _: np.random.Generator) -> Iterator[Question]:
    for a in scene.items:
        for b in scene.items:
            if a.column != b.column:
                answer = "left" if a.column < b.column else "right"
                yield Question("relation", f"Is the {a.name} left or right of the {b.name}?", answer)
            if a.row != b.row:
                answer = "above" if a.row < b.row else "below"
                yield Question("relation", f"Is the {a.name} above or below the {b.name}?", answer)


def _exists(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    present = {item.name for item in scene.items}
    # Half of the absent names recombine colours and shapes of the scene, so that neither alone reveals the answer.
    near = sorted({f"{a.colour} {b.shape}" for a in scene.items for b in scene.items} - present)
    far = sorted({f"{colour} {shape}" for colour in COLOURS for shape in SHAPES} - present)
    absent = [str(rng.choice(near if near and k % 2 == 0 else far)) for k in range(len(present))]
    for yes, no in zip(sorted(present), absent, strict=True):
        yield Question("exists", f"Is there {with_article(yes)}?", "yes")
        yield Question("exists", f"Is there {with_article(no)}?", "no")


def _where(scene: Scene, _: np.random.Generator) -> Iterator[Question]:
    for item in scene.items:
        yield Question("where", f"Where is the {item.name}?", item.place)


def _nearest(scene: Scene, _: np.random.Generator) -> Iterator[Question]:
    first, second, *_rest = sorted(scene.items, key=scene.distance)
    if scene.distance(second) - scene.distance(first) >= _NEAREST_MARGIN:
        yield Question("nearest", "Which object is nearest to the gripper?", first.name)


def _label(scene: Scene, _: np.random.Generator) -> Iterator[Question]:
    yield Question("label", "What does the label say?", scene.label.text)


def _describe(scene: Scene, _: np.random.Generator) -> Iterator[Question]:
    yield Question(DESCRIBE, DESCRIBE_PROMPT, describe(scene))


def with_article(name: str) -> str:
    """Return "a red cube" or "an orange cube"."""
    return f"an {name}" if name.startswith("orange") else f"a {name}"


def _unique(scene: Scene, attribute: str) -> list[Item]:
    values = [getattr(item, attribute) for item in scene.items]
    return [item for item in scene.items if values.count(getattr(item, attribute)) == 1]


_ASKERS: dict[str, Callable[[Scene, np.random.Generator], Iterator[Question]]] = {
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "count": _count,
    "relation": _relation,
    "exists": _exists,
    "where": _where,
    "nearest": _nearest,
    "label": _label,
    DESCRIBE: _describe,
}
KINDS = tuple(_ASKERS)
