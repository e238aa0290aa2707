"""Two TableTop scenes side by side, and questions that need both: neither picture alone holds the answer.

Half of the pairs show one table twice, with one item added, removed, moved or recoloured in between. The others are two tables
with items of the same few colours and shapes, so that the pictures have names in common and many near misses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from edgeprune.tabletop.questions import DESCRIBE, Question, ask_one, describe, with_article
from edgeprune.tabletop.world import COLOURS, SHAPES, Scene, sample_item, sample_names, sample_scene

Pair = tuple[Scene, Scene]

_ORDINALS = ("first", "second")
_OF_ONE = ("colour", "shape", "count", "where", "label")  # kinds that are also asked about one picture of the two


def sample_pair(rng: np.random.Generator, changed: float = 0.5) -> Pair:
    """Return two random scenes, for `changed` of the generators one scene before and after. Equal generators give equal pairs."""
    names = sample_names(rng)
    first = sample_scene(rng, names)
    return first, _change(first, rng, names) if rng.random() < changed else sample_scene(rng, names)


def ask_both(pair: Pair, rng: np.random.Generator, kind: str) -> Question | None:
    """Return one question of a kind about a pair, or None if the pair supports none (for example, more than one change)."""
    candidates = list(_ASKERS[kind](pair, rng))
    return candidates[int(rng.integers(len(candidates)))] if candidates else None


def change_between(pair: Pair) -> str | None:
    """Return the only difference between two scenes, such as "red cube moved", or None if there is none or more than one."""
    gone, come = (sorted(set(a.items) - set(b.items), key=lambda item: item.name) for a, b in (pair, pair[::-1]))
    if (len(gone), len(come)) == (1, 0):
        return f"{gone[0].name} removed"
    if (len(gone), len(come)) == (0, 1):
        return f"{come[0].name} added"
    if (len(gone), len(come)) != (1, 1):
        return None
    before, after = gone[0], come[0]
    if before.name == after.name and before.place != after.place:
        return f"{before.name} moved"
    return f"{before.name} turned {after.colour}" if replace(before, colour=after.colour) == after else None


def _change(scene: Scene, rng: np.random.Generator, names: list[tuple[str, str]]) -> Scene:
    # The label, the light and all other items stay; the noise is that of another photograph.
    items, used = list(scene.items), {(item.colour, item.shape) for item in scene.items}
    chosen = int(rng.integers(len(items)))
    unused = [name for name in names if name not in used]
    ways = ["moved", "turned"] + ["added"] * (len(items) < 6 and bool(unused)) + ["removed"] * (len(items) > 3)
    way = str(rng.choice(ways))
    if way == "removed":
        items.pop(chosen)
    elif way == "turned":
        colours = [colour for colour in COLOURS if (colour, items[chosen].shape) not in used]
        items[chosen] = replace(items[chosen], colour=str(rng.choice(colours)))
    else:
        moved = items.pop(chosen) if way == "moved" else None
        colour, shape = (moved.colour, moved.shape) if moved else unused[int(rng.integers(len(unused)))]
        placed = sample_item(rng, colour, shape, *_empty_cell(scene, rng))
        items.append(replace(placed, size=moved.size, radius=moved.radius) if moved else placed)
    items.sort(key=lambda item: (item.row, item.column))
    return replace(scene, items=tuple(items), noise_seed=int(rng.integers(2**31)))


def _empty_cell(scene: Scene, rng: np.random.Generator) -> tuple[int, int]:
    taken = {(item.row, item.column) for item in scene.items} | {(scene.label.row, scene.label.column)}
    free = [divmod(cell, 3) for cell in range(9) if divmod(cell, 3) not in taken]
    return free[int(rng.integers(len(free)))]


def _picture(pair: Pair, rng: np.random.Generator) -> Iterator[Question]:
    for scene, ordinal in zip(pair, _ORDINALS, strict=True):
        for kind in _OF_ONE:
            question = ask_one(scene, rng, kind)
            if question is not None:
                yield Question("picture", f"{question.prompt.rstrip('?')} in the {ordinal} picture?", question.answer)


def _which(pair: Pair, rng: np.random.Generator) -> Iterator[Question]:
    first, second = ({item.name for item in scene.items} for scene in pair)
    items = [item for scene in pair for item in scene.items]
    # Absent names recombine colours and shapes of the pictures, so that neither alone reveals the answer.
    near = {f"{a.colour} {b.shape}" for a in items for b in items} - first - second
    classes = {"first": first - second, "second": second - first, "both": first & second, "neither": near}
    for answer, names in classes.items():
        if names:
            yield Question("which", f"Which picture has {with_article(str(rng.choice(sorted(names))))}?", answer)


def _changed(pair: Pair, _: np.random.Generator) -> Iterator[Question]:
    change = change_between(pair)
    if change:
        yield Question("changed", "What changed?", change)


def _more(pair: Pair, rng: np.random.Generator) -> Iterator[Question]:
    classes: dict[str, list[str]] = {"first": [], "second": [], "neither": []}
    for word in _words(pair, rng):
        first, second = (_how_many(scene, word) for scene in pair)
        classes["first" if first > second else "second" if second > first else "neither"].append(word)
    for answer, words in classes.items():
        # Equal counts are found in every pair, a difference is not: it gets twice the weight, or "neither" would be half of all.
        for word in rng.choice(words, 1 if answer == "neither" else 2) if words else ():
            yield Question("more", f"Are there more {word} objects in the first or the second picture?", answer)


def _together(pair: Pair, rng: np.random.Generator) -> Iterator[Question]:
    for word in _words(pair, rng):
        total = sum(_how_many(scene, word) for scene in pair)
        if total < 10:  # one digit
            yield Question("together", f"How many {word} objects are there in the two pictures together?", str(total))


def _words(pair: Pair, rng: np.random.Generator) -> list[str]:
    items = [item for scene in pair for item in scene.items]
    colours, shapes = {item.colour for item in items}, {item.shape for item in items}
    return [*sorted(colours | {str(rng.choice(COLOURS))}), *sorted(shapes | {str(rng.choice(SHAPES))})]


def _how_many(scene: Scene, word: str) -> int:
    return sum(word in (item.colour, item.shape) for item in scene.items)


def _describe(pair: Pair, _: np.random.Generator) -> Iterator[Question]:
    for scene, ordinal in zip(pair, _ORDINALS, strict=True):
        yield Question(DESCRIBE, f"Describe the {ordinal} picture.", describe(scene))


_ASKERS: dict[str, Callable[[Pair, np.random.Generator], Iterator[Question]]] = {
    "picture": _picture,
    "which": _which,
    "changed": _changed,
    "more": _more,
    "together": _together,
    DESCRIBE: _describe,
}
PAIR_KINDS = tuple(_ASKERS)
