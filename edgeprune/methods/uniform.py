"""Uniform: keep tokens spread evenly over the image, the honest geometric baseline.

A stride over the raster order would keep whole columns on some grids. Here every next token is the one farthest from those
taken so far (farthest-point order from the middle, ties in reading order), so any count is spread over both axes and smaller
sets are subsets of larger ones.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from edgeprune.methods.base import InputView, LayerView, Scored
from edgeprune.plan import Cut, Geometry


class Uniform(Scored):
    """Keep the first tokens of a farthest-point order of the grid."""

    sites: ClassVar[tuple[str, ...]] = ("input", "layer", "cache")

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        cut.settings()  # nothing to set, nothing drawn by lot
        order = farthest_point_order(_places(geometry))
        scores = np.empty(geometry.tokens, np.float32)
        scores[order] = np.arange(geometry.tokens, 0, -1)
        self._scores = torch.from_numpy(scores)

    def score(self, view: InputView | LayerView) -> torch.Tensor:
        """Return how early each token comes in the order [V]."""
        return self._scores.to(view.order.device).index_select(0, view.order)


def farthest_point_order(points: np.ndarray) -> np.ndarray:
    """Return the indices of points [V, axes], each the farthest from all before it; the first is the one in the middle."""
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    order = [int(np.square(points - middle).sum(axis=1).argmin())]
    nearest = np.full(len(points), np.inf)
    for _ in range(len(points) - 1):
        nearest = np.minimum(nearest, np.square(points - points[order[-1]]).sum(axis=1))
        order.append(int(nearest.argmax()))
    return np.array(order)


def raster(rows: int, columns: int) -> np.ndarray:
    """Return the points (row, column) of a grid [rows * columns, 2]."""
    return np.stack(np.divmod(np.arange(rows * columns), columns), axis=1).astype(np.float64)


def _places(geometry: Geometry) -> np.ndarray:
    # Tiles lie beside each other, views of the same place (frames, an overview) as far apart as a grid is wide.
    if not geometry.views:
        return raster(geometry.rows, geometry.columns)
    points, unit = [], geometry.patch * geometry.merge
    for number, view in enumerate(geometry.views):
        grid = raster(view.rows, view.columns + view.separators)
        step = np.array([view.height / view.rows, view.width / max(view.columns, 1)]) / unit
        corner = np.array([view.top, view.left]) / unit
        layer = np.full(len(grid), sum(view.top == other.top and view.left == other.left for other in geometry.views[:number]))
        points.append(np.column_stack([corner + (grid + 0.5) * step, layer * max(view.rows, view.columns)]))
    return np.concatenate(points)
