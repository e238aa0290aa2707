"""Demosaic the pixels of a Bayer sensor, whose every pixel has one colour: "rggb" names those of the top left 2 x 2 pixels.

Missing colours are the means of their nearest neighbours (bilinear). Results equal OpenCV's cvtColor, which ROS's image_proc uses,
the outermost rows and columns included: they repeat the next ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeprune.errors import ImageError

PATTERNS = ("rggb", "bggr", "gbrg", "grbg")
_RED, _GREEN, _BLUE = 0, 1, 2


def demosaic(mosaic: np.ndarray, pattern: str) -> np.ndarray:
    """Return RGB [height, width, 3] of a uint8 or uint16 mosaic [height, width]. Raises ImageError for one below 3 x 3 pixels."""
    height, width = mosaic.shape
    if min(height, width) < 3:
        raise ImageError(f"A Bayer image of {width}x{height} pixels has no neighbours to mean.", hint="Give 3x3 pixels or more.")
    red_row, red_column = divmod(pattern.index("r"), 2)
    wide = mosaic.astype(np.uint16 if mosaic.dtype.itemsize == 1 else np.uint32)  # sums of four values
    rgb = np.empty((height, width, 3), mosaic.dtype.newbyteorder("="))
    for row in (1, 2):
        for column in (1, 2):
            inner = rgb[row : height - 1 : 2, column : width - 1 : 2]
            _fill(inner, _Neighbours(wide, row, column), row % 2 == red_row, column % 2 == red_column)
    rgb[:, 0], rgb[:, -1] = rgb[:, 1], rgb[:, -2]
    rgb[0], rgb[-1] = rgb[1], rgb[-2]
    return rgb


@dataclass(frozen=True)
class _Neighbours:
    # Every second pixel from (row, column) on, without the last row and column, and the means of the pixels around each.
    mosaic: np.ndarray
    row: int
    column: int

    def at(self, down: int, right: int) -> np.ndarray:
        height, width = self.mosaic.shape
        return self.mosaic[self.row + down : height - 1 + down : 2, self.column + right : width - 1 + right : 2]

    def beside(self) -> np.ndarray:
        mean: np.ndarray = (self.at(0, -1) + self.at(0, 1) + 1) >> 1
        return mean

    def above_and_below(self) -> np.ndarray:
        mean: np.ndarray = (self.at(-1, 0) + self.at(1, 0) + 1) >> 1
        return mean

    def cross(self) -> np.ndarray:
        mean: np.ndarray = (self.at(-1, 0) + self.at(1, 0) + self.at(0, -1) + self.at(0, 1) + 2) >> 2
        return mean

    def diagonal(self) -> np.ndarray:
        mean: np.ndarray = (self.at(-1, -1) + self.at(-1, 1) + self.at(1, -1) + self.at(1, 1) + 2) >> 2
        return mean


def _fill(rgb: np.ndarray, near: _Neighbours, red_row: bool, red_column: bool) -> None:
    if red_row == red_column:  # a red or a blue pixel
        own, opposite = (_RED, _BLUE) if red_row else (_BLUE, _RED)
        rgb[..., own], rgb[..., _GREEN], rgb[..., opposite] = near.at(0, 0), near.cross(), near.diagonal()
    else:
        in_row, in_column = (_RED, _BLUE) if red_row else (_BLUE, _RED)
        rgb[..., in_row], rgb[..., _GREEN], rgb[..., in_column] = near.beside(), near.at(0, 0), near.above_and_below()
