"""Write TableTop scenes as a data set of images and JSON lines, or draw them at the size of a bundle's geometry."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from edgeprune.errors import UsageError
from edgeprune.io.files import new_folder
from edgeprune.plan import Geometry
from edgeprune.tabletop.drawing import draw_scene
from edgeprune.tabletop.pairs import PAIR_KINDS, Pair, ask_both, sample_pair
from edgeprune.tabletop.questions import KINDS, Question, ask_one
from edgeprune.tabletop.world import Scene, sample_scene

_STREAM, _PAIR_STREAM = 20_250_103, 20_250_104  # first elements of the seeds; training uses other streams


def scenes(seed: int, count: int) -> Iterator[tuple[Scene, list[Question]]]:
    """Yield `count` scenes, each with one question of every kind that it supports. Scene i depends only on (seed, i)."""
    for index in range(count):
        rng = np.random.default_rng([_STREAM, seed, index])
        scene = sample_scene(rng)
        questions = (ask_one(scene, rng, kind) for kind in KINDS)
        yield scene, [question for question in questions if question is not None]


def pairs(seed: int, count: int) -> Iterator[tuple[Pair, list[Question]]]:
    """Yield `count` pairs of scenes, each with one question of every kind that it supports. Pair i depends only on (seed, i)."""
    for index in range(count):
        rng = np.random.default_rng([_PAIR_STREAM, seed, index])
        pair = sample_pair(rng)
        questions = (ask_both(pair, rng, kind) for kind in PAIR_KINDS)
        yield pair, [question for question in questions if question is not None]


def write_dataset(
    out: Path,
    count: int,
    seed: int,
    *,
    images: int = 1,
    kinds: Sequence[str] = (),
    force: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Write `out`/images and `out`/dataset.jsonl atomically; return the number of questions.

    `images`: 1, or 2 for pairs of scenes, whose lines name both images. `kinds`: of the questions, all if empty.
    """
    if count < 1 or seed < 0:
        raise UsageError(f"Cannot draw {count} scenes of seed {seed}.", hint="Ask for at least one scene, and a seed of 0 or more.")
    _check_kinds(images, kinds)
    lines: list[str] = []
    with new_folder(out, force=force) as folder:
        (folder / "images").mkdir()
        for index, (shown, questions) in enumerate(_drawn(seed, count, images)):
            names = [f"images/{index:06}{suffix}.png" for suffix in ("ab" if images == 2 else ("",))]
            for name, scene in zip(names, shown, strict=True):
                draw_scene(scene).save(folder / name)
            for q in questions:
                if not kinds or q.kind in kinds:
                    image = names if images > 1 else names[0]
                    lines.append(json.dumps({"image": image, "prompt": q.prompt, "answer": q.answer, "kind": q.kind}))
            progress(index + 1)
        (folder / "dataset.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def _check_kinds(images: int, kinds: Sequence[str]) -> None:
    known = {1: KINDS, 2: PAIR_KINDS}
    if images not in known:
        raise UsageError(f"No TableTop questions are about {images} images.", hint="Ask for 1 or 2 images.")
    for kind in kinds:
        if kind not in known[images]:
            hint = f"Kinds about {'one image' if images == 1 else 'two images'}: {', '.join(known[images])}."
            raise UsageError(f"No kind of question is called {kind!r}.", hint=hint)


def _drawn(seed: int, count: int, images: int) -> Iterator[tuple[Sequence[Scene], list[Question]]]:
    if images == 2:
        yield from pairs(seed, count)
    else:
        yield from (((scene,), questions) for scene, questions in scenes(seed, count))


def frames_for(geometry: Geometry, seed: int = 1) -> list[Image.Image]:
    """Return one scene per frame at the geometry's image size, for trying models that were not trained on TableTop."""
    size, rng = (geometry.width, geometry.height), np.random.default_rng(seed)
    return [draw_scene(sample_scene(rng)).resize(size, Image.Resampling.BICUBIC) for _ in range(geometry.frames)]
