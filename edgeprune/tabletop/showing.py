"""TableTop scenes in the form that a bundle takes: for trials of a model that was trained on something else."""

from __future__ import annotations

import numpy as np
from PIL import Image

from edgeprune.plan import Geometry
from edgeprune.tabletop.drawing import draw_scene
from edgeprune.tabletop.world import sample_scene


def frames_for(geometry: Geometry, seed: int = 1) -> list[Image.Image]:
    """Return one scene of the geometry's size, or as many different ones as a video has frames."""
    size, rng = (geometry.width, geometry.height), np.random.default_rng(seed)
    return [draw_scene(sample_scene(rng)).resize(size, Image.Resampling.BICUBIC) for _ in range(geometry.frames)]
