"""Stamps of Tux Paint that are photographs: what they show, which are held out, and their pictures in memory.

`photographs.tsv` says which stamps of Debian's tuxpaint-stamps-default are used: those that are photographs, with a name and a kind
each. None of the pictures is part of this repository; their licences are in README.md.

About a seventh of the pictures is held out. Most of them show a thing that training has in another picture; the others have a name
that training never has.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from edgeprune.errors import UsageError
from edgeprune.io.files import write_bytes

LONGEST = 160  # pixels of a picture
SPLITS = ("train", "held-out")
TRAIN, HELD_OUT = SPLITS

_TABLE = Path(__file__).with_name("photographs.tsv")
_UNASKED = ("object", "mushroom")  # no kind that anyone would answer
_WITHHELD_FROM = 8  # names that a kind needs before one of them is withheld from training
_GENERAL = {"bird": "animal", "fish": "animal", "insect": "animal"}


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
        return word in (self.name, self.kind, self.general)

    @property
    def general(self) -> str:
        """The wider kind, or the kind where there is none."""
        return _GENERAL.get(self.kind, self.kind)

    @property
    def is_kind_asked(self) -> bool:
        """Whether the kind says more than the name, and is one that a user would answer."""
        return self.kind not in (*_UNASKED, self.name)


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
        """Return the pictures of a split.

        Raises:
            UsageError: There is no such split, or it has no pictures.
        """
        if split not in SPLITS:
            raise UsageError(f"Photographs have no split {split!r}.", hint=f"Splits: {', '.join(SPLITS)}.")
        pictures = [picture for picture in self.pictures if picture.entry.split == split]
        if not pictures:
            raise UsageError(f"None of the stamps is of the split {split}.", hint="Use all stamps of tuxpaint-stamps-default.")
        return pictures


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
