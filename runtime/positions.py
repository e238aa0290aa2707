"""Positions of text and image tokens, as the model was trained with them.

With mRoPE (three axes: time, height, width; Qwen2-VL, section 2.1 of arXiv 2409.12191) a text token has one number on all axes,
an image spans its grid, and text goes on after the largest number used. Pruning never renumbers: kept tokens stay where they
were and the next token comes after the unpruned length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeprune.plan import View


def text_positions(start: int, count: int, axes: int) -> np.ndarray:
    """Return the positions [axes, count] of `count` text tokens from `start`."""
    return np.tile(np.arange(start, start + count, dtype=np.int64), (axes, 1))


def span_positions(start: int, views: Sequence[View], axes: int) -> tuple[np.ndarray, int]:
    """Return the positions [axes, tokens] of visual tokens without text between them, and the position of the token after them.

    With mRoPE the views lie over each other at their times, which are those of a video's frames. Text goes on after the largest
    position, as it was in training; transformers 5.23 goes on after the grid alone, which is the same but for videos with more
    steps in time than tokens along a side.
    """
    tokens = sum(view.tokens for view in views)
    if axes == 1:
        return text_positions(start, tokens, axes), start + tokens
    grids = [np.indices((1, view.rows, view.columns), dtype=np.int64).reshape(3, -1) for view in views]
    for grid, view in zip(grids, views, strict=True):
        grid[0] += view.time - views[0].time
    positions = start + np.concatenate(grids, axis=1)
    return positions, int(positions.max()) + 1
