"""Photographs: a second world of "what is this", "how many" and "where", made of stamps of Tux Paint that the user installs.

    apt-get install tuxpaint-stamps-default          (or: apt-get download, dpkg-deb -x PACKAGE FOLDER)
    python examples/train_tabletop/photographs.py /usr/share/tuxpaint/stamps OUT --scenes 100 --seed 1 --split held-out
    python examples/train_tabletop/photographs.py /usr/share/tuxpaint/stamps --pack photographs.zip

OUT is a data set for `edgeprune eval --data OUT/dataset.jsonl`. A pack is one file with what is used of the stamps, at most 160
pixels each; it takes the place of the folder everywhere.

A scene has one to six things on the grid of TableTop, with its words for places and its form of descriptions. Of held-out pictures
whose name training never has, only the kind is asked (`photo: new kind`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from photo_questions import PHOTO_KINDS, Scene, Thing, ask, ask_each
from PIL import Image
from stamps import HELD_OUT, SPLITS, TRAIN, Photographs, Picture, load_photographs, write_pack

from edgeprune.errors import EdgePruneError
from edgeprune.io.files import check_output, new_folder
from edgeprune.tabletop.questions import DESCRIBE, Question
from edgeprune.tabletop.world import CELL, RIM
from edgeprune.tabletop.world import SIDE as TABLETOP_SIDE

__all__ = ["PHOTO_KINDS", "SIDE", "Photographs", "draw", "load_photographs", "sample", "write_dataset"]

SIDE = 336  # pixels of a scene: what TableTop-L sees

_STREAM = 20_250_105  # first element of the seeds of data sets; training uses other streams
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


def sample(rng: np.random.Generator, photographs: Photographs, split: str = TRAIN) -> tuple[Image.Image, list[Question]]:
    """Return a random scene [SIDE x SIDE, RGB] and about 20 questions in random order. Equal generators give equal scenes."""
    scene, image = draw(rng, photographs, split)
    return image, ask(scene, rng)


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
    # By name, so that names with many pictures are not more frequent. Scenes of few names, or of one kind, have counts above one.
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
    cell, rim = SIDE * CELL / TABLETOP_SIDE, SIDE * RIM / TABLETOP_SIDE
    corner = [rim + cell * at + float(rng.uniform(-7, 7)) - side / 2 for at, side in zip(centre, image.size, strict=True)]
    left, top = (round(min(max(at, 2), SIDE - 2 - side)) for at, side in zip(corner, image.size, strict=True))
    scene.paste(image, (left, top), image)


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
