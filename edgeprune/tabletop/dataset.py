"""Write TableTop scenes as a data set of images and JSON lines, or draw them at the size of a bundle's geometry."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from edgeprune.errors import UsageError
from edgeprune.io.files import new_folder
from edgeprune.plan import Geometry
from edgeprune.tabletop.drawing import draw_scene
from edgeprune.tabletop.questions import KINDS, Question, ask_one
from edgeprune.tabletop.world import Scene, sample_scene

_STREAM = 20_250_103  # first element of every seed; training uses other streams


def scenes(seed: int, count: int) -> Iterator[tuple[Scene, list[Question]]]:
    """Yield `count` scenes, each with one question of every kind that it supports. Scene i depends only on (seed, i)."""
    for index in range(count):
        rng = np.random.default_rng([_STREAM, seed, index])
        scene = sample_scene(rng)
        questions = (ask_one(scene, rng, kind) for kind in KINDS)
        yield scene, [question for question in questions if question is not None]


def write_dataset(
    out: Path, count: int, seed: int, *, force: bool = False, progress: Callable[[int], None] = lambda done: None
) -> int:
    """Write `out`/images and `out`/dataset.jsonl atomically; return the number of questions."""
    if count < 1 or seed < 0:
        raise UsageError(f"Cannot draw {count} scenes of seed {seed}.", hint="Ask for at least one scene, and a seed of 0 or more.")
    lines: list[str] = []
    with new_folder(out, force=force) as folder:
        (folder / "images").mkdir()
        for index, (scene, questions) in enumerate(scenes(seed, count)):
            name = f"images/{index:06}.png"
            draw_scene(scene).save(folder / name)
            for q in questions:
                lines.append(json.dumps({"image": name, "prompt": q.prompt, "answer": q.answer, "kind": q.kind}))
            progress(index + 1)
        (folder / "dataset.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def frames_for(geometry: Geometry, seed: int = 1) -> list[Image.Image]:
    """Return one scene per frame at the geometry's image size, for trying models that were not trained on TableTop."""
    size, rng = (geometry.width, geometry.height), np.random.default_rng(seed)
    return [draw_scene(sample_scene(rng)).resize(size, Image.Resampling.BICUBIC) for _ in range(geometry.frames)]
