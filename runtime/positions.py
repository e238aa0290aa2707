"""Positions of text and image tokens, as the model was trained with them.

With mRoPE (three axes: time, height, width; Qwen2-VL, section 2.1 of arXiv 2409.12191) a text token has one number on all axes,
an image spans its grid, and text goes on after the largest number used. Pruning never renumbers: kept tokens stay where they
were and the next token comes after the unpruned length.
"""

from __future__ import annotations

import numpy as np


def text_positions(start: int, count: int, axes: int) -> np.ndarray:
    """Return the positions [axes, count] of `count` text tokens from `start`."""
    return np.tile(np.arange(start, start + count, dtype=np.int64), (axes, 1))


def image_positions(start: int, rows: int, columns: int, axes: int) -> tuple[np.ndarray, int]:
    """Return the positions [axes, rows * columns] of an image's tokens, and the position of the token after it."""
    if axes == 1:
        return text_positions(start, rows * columns, axes), start + rows * columns
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int64), columns)
    return start + np.stack([np.zeros_like(row), row, column]), start + max(rows, columns)
