"""Questions about a scene of photographs, each with its one correct answer.

A word asks for what has it as name, as kind, or as wider kind. Nothing is asked where people would differ, such as whether there is
a truck where there is a fire truck; and nothing by a name that training never has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from stamps import TRAIN, Entry, Picture, asked_kinds, catalogue

from edgeprune.tabletop.questions import DESCRIBE_PROMPT, Question
from edgeprune.tabletop.world import PLACES

QUESTIONS = 20  # of a scene, at most
DESCRIBED = 0.3  # share of the scenes that begin with a description

_PLURALS = {"mouse": "mice", "goose": "geese", "person": "people", "woodlouse": "woodlice", "mango": "mangoes"}
_PLURALS |= {"potato": "potatoes", "tomato": "tomatoes"}
_SAME = ("fish", "sheep", "deer", "reindeer", "bison", "chamois", "lionfish", "shrimp", "spacecraft", "squash", "iris")
_PAIRS = ("scissors", "binoculars", "pliers", "grapes", "cherries")
_MASS = ("broccoli", "garlic", "ginger", "corn", "lettuce", "food")
# Where one of them is in the picture, nobody can say without dispute whether the others are.
_DISPUTED = tuple(
    frozenset(names.split("|"))
    for names in (
        "chicken|rooster|roast turkey|turkey|guinea fowl",
        "mouse|rat",
        "chimpanzee|monkey|gorilla",
        "cow|bull|zebu|yak|bison|gnu",
        "goat|chamois|antelope",
        "horse|donkey|zebra",
        "deer|reindeer|antelope",
        "blackbird|crow|magpie|lark|cuckoo",
        "crane|heron|flamingo",
        "ostrich|rhea",
        "quetzal|parrot|toucan",
        "wasp|hoverfly|fly|moth",
        "dolphin|orca|whale",
        "otter|ferret|badger|marmot|beaver|capybara",
        "airplane|fighter jet",
        "tank|armored vehicle",
        "car|race car|truck",
        "violin|cello|guitar",
        "apple|pomegranate",
        "orange|apricot|lemon",
        "potato|yam",
        "light bulb|candle",
        "kettle|teapot|pitcher|mug",
        "toolbox|tool",
        "moon|planet",
        "teddy bear|doll|person",
        "spacecraft|vehicle",
    )
)
# Things of which one may say the word, or not: left of ":" the word, right the names and kinds.
_LOOSE = {
    "animal": "person|toy|shell|food",
    "bird": "toy|food",
    "fish": "seahorse|lobster|shrimp|whale|dolphin|orca|shell",
    "insect": "woodlouse|slug|lobster|shrimp",
    "fruit": "vegetable|nut|food|mushroom",
    "vegetable": "fruit|mushroom|nut|food",
    "nut": "fruit|pine cone",
    "food": "fruit|vegetable|nut|mushroom|turkey|fish|shell",
    "vehicle": "cement mixer|wheel|person",
    "tool": "object",
    "toy": "ball|object|vehicle|person",
    "flower": "vegetable|wreath",
    "tree": "pine cone|wreath|flower",
    "ball": "planet|moon|fruit",
    "planet": "ball",
    "person": "toy|object",
    "instrument": "object",
    "spacecraft": "person",
}


@dataclass(frozen=True)
class Thing:
    """A picture in a scene, on a cell of the grid; `row` is -1 where one thing fills most of the scene."""

    picture: Picture
    row: int
    column: int

    @property
    def entry(self) -> Entry:
        """What it is."""
        return self.picture.entry

    @property
    def place(self) -> str:
        """The name of the grid cell."""
        return PLACES[self.row][self.column]


@dataclass(frozen=True)
class Scene:
    """Things in reading order, and the colour of the background ("" where it has no one colour)."""

    things: tuple[Thing, ...]
    background: str = ""

    @property
    def large(self) -> bool:
        """Whether one thing fills most of the scene."""
        return self.things[0].row < 0


def ask(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Return up to QUESTIONS different questions in random order, now and then with a description first."""
    left = {kind: list(asker(scene, rng)) for kind, asker in _ASKERS.items()}
    asked = left.pop("describe")
    if rng.random() >= DESCRIBED:
        asked = []
    while len(asked) < QUESTIONS and (kinds := [kind for kind in left if left[kind] for _ in range(_OFTEN.get(kind, 1))]):
        kind = kinds[int(rng.integers(len(kinds)))]
        asked.append(left[kind].pop(int(rng.integers(len(left[kind])))))
    return asked


def ask_each(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Return one question of each kind that the scene supports."""
    candidates = (list(asker(scene, rng)) for asker in _ASKERS.values())
    return [each[int(rng.integers(len(each)))] for each in candidates if each]


def describe(scene: Scene) -> str:
    """Return the description, in the form of TableTop's: things in reading order, each with its place unless it fills the scene."""
    stated = (thing.entry.name if scene.large else f"{thing.entry.name} at {thing.place}" for thing in scene.things)
    return ", ".join(stated) + "."


def _describe(scene: Scene, _: np.random.Generator) -> Iterator[Question]:
    if all(not thing.entry.new for thing in scene.things):
        yield Question("photo: describe", DESCRIBE_PROMPT, describe(scene))


def _what(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    (*rest, thing) = scene.things
    if not rest and not thing.entry.new:
        prompts = ("What is this?", "What is in the picture?", "What do you see?", "What is shown here?")
        yield Question("photo: what", str(rng.choice(prompts)), thing.entry.name)


def _at(scene: Scene, _: np.random.Generator) -> Iterator[Question]:
    if not scene.large:
        for thing in scene.things:
            if not thing.entry.new:
                yield Question("photo: at", f"What is {_at_place(thing.place)}?", thing.entry.name)


def _kind(scene: Scene, _: np.random.Generator) -> Iterator[Question]:
    for thing in scene.things:
        if thing.entry.is_kind_asked:
            prompt = "What kind of thing is this?" if scene.large else f"What kind of thing is {_at_place(thing.place)}?"
            yield Question("photo: new kind" if thing.entry.new else "photo: kind", prompt, thing.entry.kind)


def _count(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    yield Question("photo: count", "How many things are there?", str(len(scene.things)))
    present = [word for word in _words(scene) if _is_clear(scene, word) and word not in (*_PAIRS, *_MASS) and word.islower()]
    several = [word for word in present if len(_called(scene, word)) > 1]
    single = [word for word in present if word not in several]
    absent = [word for word in _absent(scene, rng, 4, kinds=0.2) if word not in (*_PAIRS, *_MASS) and word.islower()]
    for word in (*several, *single[:2], *absent[:1]):
        verb = ("are there", "do you see", "are in the picture")[int(rng.integers(3))]
        yield Question("photo: count", f"How many {_plural(word)} {verb}?", str(len(_called(scene, word))))


def _where(scene: Scene, _: np.random.Generator) -> Iterator[Question]:
    for word in () if scene.large else _words(scene):
        called = _called(scene, word)
        if len(called) == 1 and _is_clear(scene, word) and word != "food":
            verb = "are" if word in _PAIRS else "is"
            yield Question("photo: where", f"Where {verb} {_the(word)}?", called[0].place)


def _exists(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    present = [word for word in _words(scene) if _is_clear(scene, word)]
    # As many kinds among them, so that how general a word is tells nothing.
    absent = _absent(scene, rng, len(present), kinds=sum(word in asked_kinds() for word in present) / max(len(present), 1))
    for yes, no in zip(present, absent, strict=False):
        yield Question("photo: exists", _is_there(yes), "yes")
        yield Question("photo: exists", _is_there(no), "no")


def _relation(scene: Scene, _: np.random.Generator) -> Iterator[Question]:
    named = [thing for thing in scene.things if _is_unique(scene, thing)]
    for a in named:
        for b in named:
            verb = "Are" if a.entry.name in _PAIRS else "Is"
            pair = f"{_the(a.entry.name)} {{}} {_the(b.entry.name)}?"
            if a.column != b.column:
                answer = "left" if a.column < b.column else "right"
                yield Question("photo: relation", f"{verb} {pair.format('left or right of')}", answer)
            if a.row != b.row:
                answer = "above" if a.row < b.row else "below"
                yield Question("photo: relation", f"{verb} {pair.format('above or below')}", answer)


def _beside(scene: Scene, _: np.random.Generator) -> Iterator[Question]:
    at = {(thing.row, thing.column): thing for thing in scene.things}
    for thing in scene.things:
        for (down, right), words in _NEXT.items():
            other = at.get((thing.row + down, thing.column + right))
            if other is not None and not other.entry.new and _is_unique(scene, thing):
                yield Question("photo: beside", f"What is directly {words} {_the(thing.entry.name)}?", other.entry.name)


def _ground(scene: Scene, _: np.random.Generator) -> Iterator[Question]:
    if scene.background:
        yield Question("photo: background", "What colour is the background?", scene.background)


_NEXT = {(0, -1): "left of", (0, 1): "right of", (-1, 0): "above", (1, 0): "below"}


def _words(scene: Scene) -> list[str]:
    # Names, kinds and wider kinds of what is there. Names that training never has are not asked about.
    entries = [thing.entry for thing in scene.things]
    names = [entry.name for entry in entries if not entry.new]
    kinds = [word for entry in entries for word in (entry.kind, entry.general) if word != "object"]
    return list(dict.fromkeys(names + kinds))


def _absent(scene: Scene, rng: np.random.Generator, count: int, kinds: float) -> list[str]:
    # A share are kinds, animals often, since they often are there. Of the names half, where possible, are of a kind that is there.
    known = [entry for entry in catalogue() if entry.split == TRAIN]
    present = {thing.entry.kind for thing in scene.things}
    near = list(dict.fromkeys(entry.name for entry in known if entry.kind in present))
    far = list(dict.fromkeys(entry.name for entry in known))
    found: list[str] = []
    for _ in range(12 * count):
        pool: Sequence[str] = near if near and rng.random() < 0.5 else far
        if rng.random() < kinds:
            pool = (*asked_kinds(), *["animal"] * 4)
        word = pool[int(rng.integers(len(pool)))]
        if word not in found and not _called(scene, word) and _is_clear(scene, word):
            found.append(word)
        if len(found) == count:
            break
    return found


def _called(scene: Scene, word: str) -> list[Thing]:
    return [thing for thing in scene.things if thing.entry.is_called(word)]


def _is_unique(scene: Scene, thing: Thing) -> bool:
    name = thing.entry.name
    return not thing.entry.new and not scene.large and len(_called(scene, name)) == 1 and _is_clear(scene, name)


def _is_clear(scene: Scene, word: str) -> bool:
    """Return whether nobody could say the word of something in the scene that is not called so here."""
    entries = (thing.entry for thing in scene.things)
    return not any(_is_disputed(entry.name, entry.kind, word) for entry in entries if not entry.is_called(word))


@cache
def _is_disputed(name: str, kind: str, word: str) -> bool:
    own = {name, kind}
    if own & set(_LOOSE.get(word, "").split("|")) or set(word.split()) & set(name.split()):
        return True
    return any(word in names and own & names for names in _DISPUTED)


def _at_place(place: str) -> str:
    if place == "middle":
        return "in the middle"
    return f"on the {place}" if place in ("left", "right") else f"at the {place}"


def _the(name: str) -> str:
    return f"the {name}" if name[0].islower() or " " in name else name


def _is_there(word: str) -> str:
    if word in _PAIRS:
        return f"Are there any {word}?"
    if word in _MASS:
        return f"Is there any {word}?"
    if not word[0].islower() and " " not in word:
        return f"Is {word} in the picture?"
    return f"Is there {'an' if word[0] in 'aeiou' else 'a'} {word}?"


def _plural(word: str) -> str:
    *first, last = word.split()
    if last in _SAME:
        return word
    if last in _PLURALS:
        ending = _PLURALS[last]
    elif last.endswith("y") and last[-2] not in "aeiou":
        ending = f"{last[:-1]}ies"
    else:
        ending = last + ("es" if last.endswith(("s", "x", "ch", "sh")) else "s")
    return " ".join([*first, ending])


_ASKERS: dict[str, Callable[[Scene, np.random.Generator], Iterator[Question]]] = {
    "describe": _describe,
    "what": _what,
    "at": _at,
    "kind": _kind,
    "count": _count,
    "where": _where,
    "exists": _exists,
    "relation": _relation,
    "beside": _beside,
    "background": _ground,
}
_OFTEN = {"what": 4, "at": 4, "count": 3, "exists": 2, "where": 2}
PHOTO_KINDS = (*(f"photo: {kind}" for kind in _ASKERS), "photo: new kind")
