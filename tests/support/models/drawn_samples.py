"""Samples of words drawn by lot about drawn scenes, for what is measured on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from edgeprune.calibration.data.samples import WeightSamples
from edgeprune.tabletop.drawing import draw_scene
from edgeprune.tabletop.world import sample_scene

WORDS = "the cup is red and left of a plate what color how many green apples are there"


def samples(folder: Path, first: int, count: int = 6) -> WeightSamples:
    """Return samples about drawn scenes, with answers except for the last."""
    lines, words = [], WORDS.split()
    for index in range(first, first + count):
        rng = np.random.default_rng(index)
        draw_scene(sample_scene(rng)).resize((112, 84)).save(folder / f"{index}.png")
        said = " ".join(rng.choice(words, 6))
        answer = {} if index == first + count - 1 else {"answer": said}
        lines.append(json.dumps({"image": f"{index}.png", "prompt": f"{said}?", **answer}))
    (folder / f"{first}.jsonl").write_text("\n".join(lines))
    return WeightSamples.read(folder / f"{first}.jsonl", "exact")
