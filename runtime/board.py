"""The picture that visual tokens are drawn on: an image, its tiles and their overview, or the frames of a video, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from edgeprune.plan import View

MIN_WIDTH = 384  # of a sheet; smaller images are enlarged to it
MAX_SIDE = 1024  # of the image in a sheet; larger images are reduced to it

_GAP = 8
_PAPER = (250, 250, 248)


@dataclass(frozen=True)
class Board:
    """A `picture`, and where on it the tokens of each view lie: boxes in its pixels."""

    picture: Image.Image
    views: tuple[View, ...]

    @classmethod
    def plain(cls, image: Image.Image, rows: int, columns: int) -> Board:
        """Return the board of one image that is one grid of tokens."""
        return cls.of([image], image.size, (View(0, 0, image.height, image.width, rows, columns),))

    @classmethod
    def of(cls, frames: Sequence[Image.Image], size: tuple[int, int], views: Sequence[View]) -> Board:
        """Return the board of an image, or of a video's frames, whose views' boxes lie in pictures of `size` (width, height).

        Views whose boxes overlap go onto sheets of their own, from left to right.
        """
        sheets = _sheets(views)
        pictures = [_scaled(frames[number * len(frames) // len(sheets)].convert("RGB")) for number in range(len(sheets))]
        width = sum(picture.width for picture in pictures) + _GAP * (len(pictures) - 1)
        whole = Image.new("RGB", (width, max(picture.height for picture in pictures)), _PAPER)
        placed, left = [], 0
        for picture, sheet in zip(pictures, sheets, strict=True):
            whole.paste(picture, (left, 0))
            placed += [_placed(view, picture.width / size[0], picture.height / size[1], left) for view in sheet]
            left += picture.width + _GAP
        return cls(whole, tuple(placed))

    @property
    def tokens(self) -> int:
        """Visual tokens of the image."""
        return sum(view.tokens for view in self.views)

    @property
    def shape(self) -> str:
        """The tokens in words."""
        return f"{self.views[0].rows} x {self.views[0].columns}" if len(self.views) == 1 else f"{len(self.views)} views"

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Return for every pixel the value of its token [V]; 0 where there is none. Separators have no place."""
        pixels = np.zeros((self.picture.height, self.picture.width), values.dtype)
        begin = 0
        for view in self.views:
            cells = values[begin : begin + view.tokens].reshape(view.rows, -1)[:, : view.columns]
            begin += view.tokens
            if cells.size:
                ys, xs = _edges(view.top, view.height, view.rows), _edges(view.left, view.width, view.columns)
                pixels[ys[0] : ys[-1], xs[0] : xs[-1]] = np.repeat(np.repeat(cells, np.diff(ys), axis=0), np.diff(xs), axis=1)
        return pixels


def _sheets(views: Sequence[View]) -> list[list[View]]:
    sheets: list[list[View]] = []
    for view in views:
        if sheets and not any(_overlap(view, other) for other in sheets[-1]):
            sheets[-1].append(view)
        else:
            sheets.append([view])
    return sheets


def _overlap(one: View, other: View) -> bool:
    down = one.top < other.top + other.height and other.top < one.top + one.height
    return down and one.left < other.left + other.width and other.left < one.left + one.width


def _scaled(image: Image.Image) -> Image.Image:
    scale = min(max(1.0, MIN_WIDTH / image.width), MAX_SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _placed(view: View, across: float, down: float, left: int) -> View:
    ys = [round(down * edge) for edge in (view.top, view.top + view.height)]
    xs = [left + round(across * edge) for edge in (view.left, view.left + view.width)]
    return View(ys[0], xs[0], ys[1] - ys[0], xs[1] - xs[0], view.rows, view.columns, view.separators, view.time)


def _edges(start: int, length: int, cells: int) -> np.ndarray:
    edges: np.ndarray = np.rint(np.linspace(start, start + length, cells + 1)).astype(np.int64)
    return edges
