"""Draw which visual tokens each cut kept: the input image, one panel per cut, and one panel for all KV caches.

The canvas shows the image, its tiles and their overview, or the frames of a video, each under its name.
`edgeprune.runtime.media.sheet` puts the panels on one sheet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from edgeprune.errors import UsageError
from edgeprune.plan import View

MIN_WIDTH = 384  # pixels; smaller images are enlarged to this width
MAX_SIDE = 1024  # pixels; larger images are reduced to this longer side
MAX_PART_SIDE = 768  # the same for each of several parts: frames, or tiles and their overview
MAX_ROW = 1640  # pixels; what would be wider continues below
CACHES = "KV caches"  # title of the panel of all cache cuts
BACKGROUND, INK, FAINT, LINE = (250, 250, 248), (28, 30, 34), (92, 96, 104), (255, 196, 0)

_GAP = 8  # between the parts of a canvas
_NAME, _NAME_SIZE = 24, 16  # height of the strip above a part, and of the letters in it
_LINE_WIDTHS, _SMALL_CELL = (1, 2), 16  # pixels: around cells smaller than this, and around others
_DIM, _LIFT = 0.28, 22.0  # grey of a dropped pixel: _DIM * luminance + _LIFT
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class TokenCanvas:
    """A picture to draw on.

    `views`: the token grids, with their boxes in pixels of the picture. `parts`: the boxes of the image, of its tiles and their
    overview, or of frames; their names stand around them. `shape`: the token grids in words.
    """

    picture: Image.Image
    views: tuple[View, ...]
    parts: tuple[Box, ...]
    shape: str

    @classmethod
    def plain(cls, image: Image.Image, rows: int, columns: int) -> TokenCanvas:
        """Return the canvas of one image with one token grid."""
        return cls.of([image], image.size, (View(0, 0, image.height, image.width, rows, columns),))

    @classmethod
    def of(cls, frames: Sequence[Image.Image], size: tuple[int, int], views: Sequence[View]) -> TokenCanvas:
        """Return the canvas of an image or of a video's frames. The boxes of `views` refer to pictures of `size` (width, height).

        Overlapping views are drawn on separate copies of the picture, in rows from left to right.
        """
        sheets = _group_views(views)
        side = MAX_SIDE if len(sheets) == 1 else MAX_PART_SIDE
        pictures = [_scaled(frames[number * len(frames) // len(sheets)].convert("RGB"), side) for number in range(len(sheets))]
        names = _names(sheets, len(frames)) if len(sheets) > 1 else []
        boxes = _arrange([picture.size for picture in pictures], _NAME if names else 0)
        joined = Image.new("RGB", (max(box[2] for box in boxes), max(box[3] for box in boxes)), BACKGROUND)
        placed = list[View]()
        for picture, sheet, box in zip(pictures, sheets, boxes, strict=True):
            joined.paste(picture, box[:2])
            placed += [_place_view(view, picture.width / size[0], picture.height / size[1], box) for view in sheet]
        for name, (left, top, _, _) in zip(names, boxes, strict=False):
            ImageDraw.Draw(joined).text((left, top - _NAME // 2), name, fill=FAINT, font=font(_NAME_SIZE), anchor="lm")
        return cls(joined, tuple(placed), tuple(boxes), _shape(sheets, len(frames)))

    @property
    def tokens(self) -> int:
        """Visual tokens of the image."""
        return sum(view.tokens for view in self.views)

    @property
    def around(self) -> np.ndarray:
        """Whether a pixel [height, width] belongs to no part."""
        outside = np.ones((self.picture.height, self.picture.width), bool)
        for left, top, right, bottom in self.parts:
            outside[top:bottom, left:right] = False
        return outside

    @property
    def line(self) -> int:
        """The width of outlines in pixels."""
        cells = [min(view.width / max(view.columns, 1), view.height / max(view.rows, 1)) for view in self.views]
        return _LINE_WIDTHS[min(cells, default=0) >= _SMALL_CELL]

    def upsample(self, values: np.ndarray) -> np.ndarray:
        """Map token values [V] to pixels [height, width]. Pixels without a token are 0. Values of separator tokens are skipped."""
        pixels = np.zeros((self.picture.height, self.picture.width), values.dtype)
        begin = 0
        for view in self.views:
            cells = values[begin : begin + view.tokens].reshape(view.rows, -1)[:, : view.columns]
            begin += view.tokens
            if cells.size:
                ys, xs = _edges(view.top, view.height, view.rows), _edges(view.left, view.width, view.columns)
                pixels[ys[0] : ys[-1], xs[0] : xs[-1]] = np.repeat(np.repeat(cells, np.diff(ys), axis=0), np.diff(xs), axis=1)
        return pixels


def _group_views(views: Sequence[View]) -> list[list[View]]:
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


def _scaled(image: Image.Image, side: int) -> Image.Image:
    scale = min(max(1.0, MIN_WIDTH / image.width), side / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _names(sheets: Sequence[Sequence[View]], frames: int) -> list[str]:
    if frames == 1:
        return [f"{len(sheet)} tiles" if len(sheet) > 1 else "overview" for sheet in sheets]
    # One grid may stand for several frames: it lies on the first of them.
    begins = [number * frames // len(sheets) + 1 for number in range(len(sheets) + 1)]
    spans = [(begin, max(begin, end - 1)) for begin, end in pairwise(begins)]
    return [f"frame {begin}" if begin == end else f"frames {begin} to {end}" for begin, end in spans]


def _shape(sheets: Sequence[Sequence[View]], frames: int) -> str:
    first = sheets[0][0]
    if len(sheets) == 1 and len(sheets[0]) == 1:
        return f"{first.rows} x {first.columns} patches"
    return f"{frames} frames" if frames > 1 else f"{sum(map(len, sheets))} views"


def _arrange(sizes: Sequence[tuple[int, int]], strip: int) -> list[Box]:
    # Rows of parts, each below a strip for its name.
    columns = max(1, (MAX_ROW + _GAP) // (max(width for width, _ in sizes) + _GAP))
    boxes, top = list[Box](), 0
    for begin in range(0, len(sizes), columns):
        row = sizes[begin : begin + columns]
        lefts = accumulate((width + _GAP for width, _ in row[:-1]), initial=0)
        boxes += [(left, top + strip, left + w, top + strip + h) for left, (w, h) in zip(lefts, row, strict=True)]
        top += strip + max(height for _, height in row) + _GAP
    return boxes


def _place_view(view: View, x_scale: float, y_scale: float, box: Box) -> View:
    ys = [box[1] + round(y_scale * edge) for edge in (view.top, view.top + view.height)]
    xs = [box[0] + round(x_scale * edge) for edge in (view.left, view.left + view.width)]
    return View(ys[0], xs[0], ys[1] - ys[0], xs[1] - xs[0], view.rows, view.columns, view.separators, view.time)


def _edges(start: int, length: int, cells: int) -> np.ndarray:
    edges: np.ndarray = np.rint(np.linspace(start, start + length, cells + 1)).astype(np.int64)
    return edges


class Panel(NamedTuple):
    """One picture with its title and caption."""

    title: str
    caption: str
    picture: Image.Image


def kept_token_panels(
    canvas: TokenCanvas, kept: Sequence[tuple[str, np.ndarray]], caches: Sequence[np.ndarray] = ()
) -> list[Panel]:
    """Return a panel of the input, and one for each cut (title, kept indices) that shows its kept tokens in full colour.

    `caches`: kept indices [heads, tokens] of each cache cut. They share one panel, in which the brightness of a token is the share
    of KV heads that keep it. Raises UsageError for an index outside the canvas's tokens.
    """
    panels = [Panel(f"input, {canvas.tokens} tokens", canvas.shape, canvas.picture)]
    for title, indices in kept:
        mask = _mask(title, indices, canvas)
        caption = f"kept {int(mask.sum())} of {canvas.tokens} ({mask.mean():.0%})"
        panels.append(Panel(title, caption, _outline(_highlight(canvas, mask), canvas.upsample(mask), canvas.line)))
    if caches:
        panels.append(_cache_panel(canvas, caches))
    return panels


def _cache_panel(canvas: TokenCanvas, caches: Sequence[np.ndarray]) -> Panel:
    masks = [_mask(CACHES, head, canvas) for heads in caches for head in heads]
    counts, share = sorted({int(mask.sum()) for mask in masks}), np.mean(masks, axis=0)
    amount = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    caption = f"each KV head keeps {amount} of {share.size} ({share.mean():.0%})"
    return Panel(CACHES, caption, _highlight(canvas, share))


def _mask(title: str, indices: np.ndarray, canvas: TokenCanvas) -> np.ndarray:
    flat = np.asarray(indices).reshape(-1)
    if flat.size and (flat.dtype.kind not in "iu" or flat.min() < 0 or flat.max() >= canvas.tokens):
        raise UsageError(f"{title!r} has kept indices that are none of the image's {canvas.tokens} visual tokens.")
    mask = np.zeros(canvas.tokens, bool)
    mask[flat.astype(np.int64)] = True
    return mask


def _highlight(canvas: TokenCanvas, share: np.ndarray) -> Image.Image:
    # Blend from dim grey (share 0) to full colour (share 1).
    weight = np.maximum(canvas.upsample(share.astype(np.float32)), canvas.around)[..., None]
    pixels = np.asarray(canvas.picture, np.float32)
    grey = _DIM * (pixels @ _LUMA)[..., None] + _LIFT
    return Image.fromarray(np.rint(grey + weight * (pixels - grey)).astype(np.uint8))


def _outline(image: Image.Image, inside: np.ndarray, width: int) -> Image.Image:
    picture = np.array(image)
    picture[inside & ~_interior(inside, width)] = LINE
    return Image.fromarray(picture)


def _interior(inside: np.ndarray, width: int) -> np.ndarray:
    # Pixels that are farther than `width` from dropped pixels and the image border.
    padded = Image.fromarray(np.pad(inside, width).astype(np.uint8))
    eroded = np.asarray(padded.filter(ImageFilter.MinFilter(2 * width + 1)), dtype=bool)
    return eroded[width:-width, width:-width]


@cache
def font(size: int) -> Font:
    """Return the font of all letters."""
    return ImageFont.load_default(size)
