"""Photographs: a second world of "what is this", "how many" and "where", made of stamps of Tux Paint that the user installs.

    apt-get install tuxpaint-stamps-default          (or: apt-get download, dpkg-deb -x PACKAGE FOLDER)
    python examples/train_tabletop/photographs.py /usr/share/tuxpaint/stamps OUT --scenes 100 --seed 1 --split held-out
    python examples/train_tabletop/photographs.py /usr/share/tuxpaint/stamps --pack photographs.zip

OUT is a data set for `edgeprune eval --data OUT/dataset.jsonl`. A pack is one file with what is used of the stamps, at most 160 pixels
each; it takes the place of the folder everywhere. `photographs.tsv` says which stamps are used: those that are photographs, with a name
and a kind each. None of the pictures is part of this repository; their licences are in README.md.

A scene has one to six things on the grid of TableTop, with its words for places and its form of descriptions. About a sixth of the
pictures is held out. Most of them show a thing that training has in another picture; the others have a name that training never has,
and only their kind is asked for (`photo: new kind`).
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.io.files import check_output, new_folder, write_bytes
from edgeprune.tabletop.questions import DESCRIBE, DESCRIBE_PROMPT, Question
from edgeprune.tabletop.world import PLACES

SIDE = 336  # pixels of a scene: what TableTop-L sees
LONGEST = 160  # pixels of a picture
SPLITS = ("train", "held-out")
TRAIN, HELD_OUT = SPLITS
QUESTIONS = 20  # of a scene, at most
DESCRIBED = 0.3  # share of the scenes that begin with a description

_TABLE = Path(__file__).with_suffix(".tsv")
_STREAM = 20_250_105  # first element of the seeds of data sets; training uses other streams
_UNASKED = ("object", "mushroom")  # no kind that anyone would answer
_WITHHELD_FROM = 8  # names that a kind needs before one of them is withheld from training
_GENERAL = {"bird": "animal", "fish": "animal", "insect": "animal"}
_SHADES = {
    "red": (200, 45, 45),
    "orange": (240, 140, 40),
    "yellow": (240, 220, 80),
    "green": (70, 150, 75),
    "blue": (60, 95, 200),
    "purple": (130, 60, 165),
    "pink": (240, 160, 190),
    "brown": (120, 80, 50),
    "grey": (128, 128, 128),
    "white": (246, 246, 246),
    "black": (18, 18, 20),
}
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
class Entry:
    """A stamp: its path below the folder of stamps without suffix, the `name` and the `kind` to answer, and its split.

    `new`: held out, and training has no picture of that name.
    """

    path: str
    name: str
    kind: str
    split: str
    new: bool

    def is_called(self, word: str) -> bool:
        """Return whether a word means this thing: its name, its kind, or the wider kind."""
        return word in (self.name, self.kind, _GENERAL.get(self.kind))


@dataclass(frozen=True)
class Picture:
    """A stamp in memory: RGBA, cut to what is visible, at most LONGEST pixels; `mean`: its visible colour."""

    entry: Entry
    image: Image.Image
    mean: tuple[float, float, float]


@dataclass(frozen=True)
class Photographs:
    """The pictures of both splits, in the order of the table."""

    pictures: tuple[Picture, ...]

    def of(self, split: str) -> list[Picture]:
        """Return the pictures of a split."""
        if split not in SPLITS:
            raise UsageError(f"Photographs have no split {split!r}.", hint=f"Splits: {', '.join(SPLITS)}.")
        return [picture for picture in self.pictures if picture.entry.split == split]


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


@cache
def catalogue() -> tuple[Entry, ...]:
    """Return every stamp that is used. What is held out follows from names and paths alone, also where some are not installed."""
    lines = [line.split("\t") for line in _TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    of_kind = {kind: sum(line[0] == kind for line in lines) for kind, *_ in lines}
    entries: list[Entry] = []
    for kind, name, listed in lines:
        paths = listed.split()
        new = len(paths) == 1 and kind not in _UNASKED and of_kind[kind] >= _WITHHELD_FROM and _digest(name) % 8 == 0
        held = sorted(paths, key=_digest)[: int(new) if len(paths) == 1 else _held_of(name, len(paths))]
        entries += [Entry(path, name, kind, HELD_OUT if path in held else TRAIN, new) for path in paths]
    return tuple(entries)


def _held_of(name: str, pictures: int) -> int:
    return _digest(name) % 2 if pictures == 2 else 1 + (pictures > 6)


def _digest(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:4], "big")


@cache
def asked_kinds() -> tuple[str, ...]:
    """Return the kinds that are answers."""
    return tuple(sorted({entry.kind for entry in catalogue()} - set(_UNASKED)))


def load_photographs(source: Path | str) -> Photographs:
    """Read the stamps of a folder (of stamps, or one that the Debian package was unpacked to), or a pack of them.

    Raises:
        UsageError: There is no such folder or file, or it has none of the stamps.
    """
    source = Path(source)
    read = _reader(source)
    pictures = [_picture(entry, encoded) for entry in catalogue() if (encoded := read(entry.path)) is not None]
    if not pictures:
        raise UsageError(f"{source} has none of the stamps.", hint="Install Debian's tuxpaint-stamps-default, or name its folder.")
    return Photographs(tuple(pictures))


def _reader(source: Path) -> Callable[[str], bytes | None]:
    # A function from a stamp's path to its encoded picture, None where there is none.
    if source.is_dir():
        below = source / "usr" / "share" / "tuxpaint" / "stamps"
        root = below if below.is_dir() else source
        return lambda path: file.read_bytes() if (file := root / f"{path}.png").is_file() else None
    if not zipfile.is_zipfile(source):
        raise UsageError(f"{source} is neither a folder of stamps nor a pack of them.", hint="Install tuxpaint-stamps-default.")
    with zipfile.ZipFile(source) as archive:
        packed = {str(PurePosixPath(name).with_suffix("")): archive.read(name) for name in archive.namelist()}
    return packed.get


def _picture(entry: Entry, encoded: bytes) -> Picture:
    with Image.open(BytesIO(encoded)) as opened:
        image = opened.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 24)).getbbox())
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.float32)
    mean = np.average(pixels[..., :3].reshape(-1, 3), axis=0, weights=pixels[..., 3].ravel() + 1e-3)
    return Picture(entry, image, (float(mean[0]), float(mean[1]), float(mean[2])))


def write_pack(photographs: Photographs, path: Path) -> None:
    """Write the pictures to one file: a zip of WebP, each named by its stamp."""
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for picture in photographs.pictures:
            encoded = BytesIO()
            picture.image.save(encoded, "WEBP", quality=88, alpha_quality=90, method=6)
            archive.writestr(zipfile.ZipInfo(f"{picture.entry.path}.webp"), encoded.getvalue())
    write_bytes(path, packed.getvalue())


def sample(rng: np.random.Generator, photographs: Photographs, split: str = TRAIN) -> tuple[Image.Image, list[Question]]:
    """Return a random scene [SIDE x SIDE, RGB] and about 20 questions in random order. Equal generators give equal scenes."""
    scene, image = draw(rng, photographs, split)
    return image, ask(scene, rng)


# Scenes


def draw(rng: np.random.Generator, photographs: Photographs, split: str = TRAIN) -> tuple[Scene, Image.Image]:
    """Return a random scene of pictures of one split, and its image."""
    things = _things(rng, photographs.of(split))
    colour, image = _background(rng, [thing.picture for thing in things])
    scene = Scene(things, colour)
    for thing in things:
        _paste(rng, image, thing, scene.large)
    return scene, image


def _things(rng: np.random.Generator, pictures: Sequence[Picture]) -> tuple[Thing, ...]:
    count = int(rng.choice(6, p=(0.25, 0.15, 0.15, 0.15, 0.15, 0.15))) + 1
    known = [picture for picture in pictures if not picture.entry.new]
    if not known or (len(known) < len(pictures) and rng.random() < 0.4):
        known = list(pictures)
    chosen = _chosen(rng, known, count)
    if count == 1 and rng.random() < 0.6:
        return (Thing(chosen[0], -1, -1),)
    cells = np.sort(rng.permutation(9)[:count])
    return tuple(Thing(picture, *divmod(int(cell), 3)) for picture, cell in zip(chosen, cells, strict=True))


def _chosen(rng: np.random.Generator, pictures: Sequence[Picture], count: int) -> list[Picture]:
    # By name, so that a name with many pictures is not more frequent. Scenes of few names, or mostly one kind, have counts above one.
    by_name: dict[str, list[Picture]] = {}
    for picture in pictures:
        by_name.setdefault(picture.entry.name, []).append(picture)
    names = list(by_name)
    theme = rng.random()
    if theme < 0.35:
        names = [names[i] for i in rng.permutation(len(names))[: int(rng.integers(1, 4))]]
    elif theme < 0.65:
        kind = by_name[names[int(rng.integers(len(names)))]][0].entry.kind
        alike = [name for name in names if by_name[name][0].entry.kind == kind]
        names = alike + [names[i] for i in rng.permutation(len(names))[: max(1, len(alike) // 2)]]
    drawn = [by_name[names[int(rng.integers(len(names)))]] for _ in range(count)]
    return [same[int(rng.integers(len(same)))] for same in drawn]


def _background(rng: np.random.Generator, pictures: Sequence[Picture]) -> tuple[str, Image.Image]:
    # Of a few, the first on which everything can be seen.
    most, colour, pixels = -1.0, "", np.zeros((2, 2, 3))
    for _ in range(8):
        other, drawn = _PATTERNS[int(rng.integers(len(_PATTERNS)))](rng)
        mean = drawn.reshape(-1, 3).mean(axis=0)
        contrast = min(float(np.linalg.norm(mean - picture.mean)) for picture in pictures)
        if contrast > most:
            most, colour, pixels = contrast, other, drawn
        if contrast > 80:
            break
    small = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return colour, small.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def _plain(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    colour = str(rng.choice(list(_SHADES)))
    pixels = np.array(_SHADES[colour], np.float32) + rng.uniform(-10, 10, 3)
    return colour, pixels + rng.normal(0, 2, (84, 84, 1))


def _gradient(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    return "", rng.uniform(20, 235, 3) + rng.uniform(-70, 70, (2, 2, 3))


def _texture(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    # Grains, spots, and stripes along either axis, such as wood has.
    shapes = ((84, 84), (28, 28), (9, 9), (3, 84), (84, 3))
    shape = shapes[int(rng.integers(len(shapes)))]
    tint = rng.uniform(0.6, 1.4, 3)
    return "", rng.uniform(40, 215, 3) + tint * rng.normal(0, rng.uniform(8, 24), (*shape, 1))


_PATTERNS = (_plain, _plain, _gradient, _texture)


def _paste(rng: np.random.Generator, scene: Image.Image, thing: Thing, large: bool) -> None:
    image = thing.picture.image
    longest = rng.uniform(130, 290) if large else rng.uniform(76, 108)
    factor = longest / max(image.size)
    width, height = (max(4, round(side * factor)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.7:
        image = image.rotate(float(rng.uniform(-15, 15)), Image.Resampling.BILINEAR, expand=True)
    light = np.clip(np.arange(256) * rng.uniform(0.85, 1.15), 0, 255).astype(int).tolist()
    image = image.point([*light * 3, *range(256)])
    centre = (1.5, 1.5) if large else (thing.column + 0.5, thing.row + 0.5)
    cell, rim = SIDE * 56 / 192, SIDE * 12 / 192  # as TableTop's, at this size
    corner = [rim + cell * at + float(rng.uniform(-7, 7)) - side / 2 for at, side in zip(centre, image.size, strict=True)]
    left, top = (round(min(max(at, 2), SIDE - 2 - side)) for at, side in zip(corner, image.size, strict=True))
    scene.paste(image, (left, top), image)


# Questions


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
        entry = thing.entry
        if entry.kind not in _UNASKED and entry.kind != entry.name:
            prompt = "What kind of thing is this?" if scene.large else f"What kind of thing is {_at_place(thing.place)}?"
            yield Question("photo: new kind" if entry.new else "photo: kind", prompt, entry.kind)


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
    kinds = [word for entry in entries for word in (entry.kind, _GENERAL.get(entry.kind, entry.kind)) if word != "object"]
    return list(dict.fromkeys(names + kinds))


def _absent(scene: Scene, rng: np.random.Generator, count: int, kinds: float) -> list[str]:
    # A share are kinds, animals often, since they often are there. Of the names half, where possible, are of a kind that is there.
    known = [entry for entry in catalogue() if entry.split == TRAIN]
    present = {thing.entry.kind for thing in scene.things}
    near = list(dict.fromkeys(entry.name for entry in known if entry.kind in present))
    far = list(dict.fromkeys(entry.name for entry in known))
    found: list[str] = []
    for _ in range(12 * count):
        pool: Sequence[str] = (
            (*asked_kinds(), *["animal"] * 4) if rng.random() < kinds else near if near and rng.random() < 0.5 else far
        )
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


# Data sets


def write_dataset(photographs: Photographs, out: Path, scenes: int, seed: int, split: str, *, force: bool = False) -> int:
    """Write `out`/images and `out`/dataset.jsonl atomically; return the number of questions. Scene i depends only on (seed, i).

    Descriptions have the kind "describe", whose facts `edgeprune eval` scores.
    """
    lines: list[str] = []
    with new_folder(out, force=force) as folder:
        (folder / "images").mkdir()
        for index in range(scenes):
            rng = np.random.default_rng([_STREAM, seed, index])
            scene, image = draw(rng, photographs, split)
            name = f"images/{index:06}.png"
            image.save(folder / name)
            for q in ask_each(scene, rng):
                kind = DESCRIBE if q.kind == "photo: describe" else q.kind
                lines.append(json.dumps({"image": name, "prompt": q.prompt, "answer": q.answer, "kind": kind}))
        (folder / "dataset.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def main() -> None:
    """Parse the command line; write a data set, or a pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stamps", type=Path, help="folder of stamps, or a pack")
    parser.add_argument("out", type=Path, nargs="?", help="folder to write a data set to")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write the stamps that are used to one file")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default=HELD_OUT)
    parser.add_argument("--force", action="store_true", help="replace what is there")
    request = parser.parse_args()
    if request.out is None and request.pack is None:
        parser.error("give a folder to write to, or --pack FILE")
    try:
        photographs = load_photographs(request.stamps)
        if request.pack is not None:
            check_output(request.pack, force=request.force, inputs=[request.stamps])
            write_pack(photographs, request.pack)
        if request.out is not None:
            asked = write_dataset(photographs, request.out, request.scenes, request.seed, request.split, force=request.force)
            print(f"Wrote {asked} questions about {request.scenes} scenes to {request.out / 'dataset.jsonl'}.")
    except EdgePruneError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
