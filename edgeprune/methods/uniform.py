"""Uniform: keep tokens spread evenly over the image, the geometric baseline.

A stride over the raster order would keep entire columns on some grids. Farthest-point order is used instead: each token is the
farthest from all earlier ones, starting at the middle, with ties in reading order. Any count is spread over both axes, and smaller
sets are subsets of larger ones. Each tile and each frame is pruned this way, all equally.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from edgeprune.methods.base import EncoderView, InputView, LayerView, Scored
from edgeprune.plan import Cut, Geometry, View


class Uniform(Scored):
    """Keep the first tokens of a farthest-point order of the grid."""

    sites: ClassVar[tuple[str, ...]] = ("vision", "input", "layer", "cache")
    attention: ClassVar[str] = ""

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        cut.settings()  # the ranking has no parameters
        self._scores = torch.from_numpy(ranked([earliness(view) for view in geometry.layout]))

    def score(self, view: EncoderView | InputView | LayerView) -> torch.Tensor:
        """Return the score of each token [V], higher for earlier ones."""
        return self._scores.to(view.order.device).index_select(0, view.order)


def ranked(grids: Sequence[np.ndarray]) -> np.ndarray:
    """Return the ranks, from 1 up, of the values of all grids in sequence; they are distinct, so that every TopK agrees."""
    early = np.concatenate([grid.ravel() for grid in grids])
    scores = np.empty_like(early)
    scores[np.argsort(-early, kind="stable")] = np.arange(len(early), 0, -1)
    return scores


def earliness(view: View) -> np.ndarray:
    """Return a score for each token of a view [rows, columns + separators], from 1 for the first in farthest-point order towards 0.

    Scores are relative, so that views of different sizes are pruned equally. Separators count as a column.
    """
    rows, columns = view.rows, view.columns + view.separators
    early = np.empty(rows * columns, np.float32)
    early[farthest_point_order(rows, columns)] = np.arange(early.size, 0, -1) / early.size
    return early.reshape(rows, columns)


def farthest_point_order(rows: int, columns: int) -> np.ndarray:
    """Return the raster indices of a grid [rows * columns], each the farthest from all earlier ones."""
    points = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1).astype(np.float64)
    middle = np.array([rows - 1, columns - 1]) / 2
    order = [int(np.square(points - middle).sum(axis=1).argmin())]
    nearest = np.full(len(points), np.inf)
    for _ in range(len(points) - 1):
        nearest = np.minimum(nearest, np.square(points - points[order[-1]]).sum(axis=1))
        order.append(int(nearest.argmax()))
    return np.array(order)
