"""Draw which visual tokens each cut kept: the input image, one panel per cut, and one panel for all KV caches.

The canvas shows the image, its tiles and their overview, or the frames of a video, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from edgeprune.errors import UsageError
from edgeprune.plan import View

MIN_WIDTH = 384  # pixels; smaller images are enlarged to this width
MAX_SIDE = 1024  # pixels; larger images are reduced to this longer side
CACHES = "KV caches"  # title of the panel of all cache cuts

_GAP, _MARGIN = 8, 20
_CAPTION = 64  # height of the two text lines above a panel
_BACKGROUND, _INK, _FAINT, _LINE = (250, 250, 248), (28, 30, 34), (110, 114, 122), (255, 196, 0)
_TITLE_SIZE, _COUNT_SIZE, _SMALLEST_SIZE = 22, 18, 11
_LINE_WIDTH = 2
_DIM, _LIFT = 0.28, 22.0  # grey of a dropped pixel: _DIM * luminance + _LIFT
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class TokenCanvas:
    """A picture to draw on. `views`: the token grids, with their boxes in pixels of the picture."""

    picture: Image.Image
    views: tuple[View, ...]

    @classmethod
    def plain(cls, image: Image.Image, rows: int, columns: int) -> TokenCanvas:
        """Return the canvas of one image with one token grid."""
        return cls.of([image], image.size, (View(0, 0, image.height, image.width, rows, columns),))

    @classmethod
    def of(cls, frames: Sequence[Image.Image], size: tuple[int, int], views: Sequence[View]) -> TokenCanvas:
        """Return the canvas of an image or of a video's frames. The boxes of `views` refer to pictures of `size` (width, height).

        Overlapping views are drawn on separate copies of the picture, from left to right.
        """
        sheets = _group_views(views)
        pictures = [_scaled(frames[number * len(frames) // len(sheets)].convert("RGB")) for number in range(len(sheets))]
        width = sum(picture.width for picture in pictures) + _GAP * (len(pictures) - 1)
        joined = Image.new("RGB", (width, max(picture.height for picture in pictures)), _BACKGROUND)
        placed, left = [], 0
        for picture, sheet in zip(pictures, sheets, strict=True):
            joined.paste(picture, (left, 0))
            placed += [_place_view(view, picture.width / size[0], picture.height / size[1], left) for view in sheet]
            left += picture.width + _GAP
        return cls(joined, tuple(placed))

    @property
    def tokens(self) -> int:
        """Visual tokens of the image."""
        return sum(view.tokens for view in self.views)

    @property
    def shape(self) -> str:
        """The token grid as text, such as "16 x 16" or "5 views"."""
        return f"{self.views[0].rows} x {self.views[0].columns}" if len(self.views) == 1 else f"{len(self.views)} views"

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


def _scaled(image: Image.Image) -> Image.Image:
    scale = min(max(1.0, MIN_WIDTH / image.width), MAX_SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _place_view(view: View, x_scale: float, y_scale: float, left: int) -> View:
    ys = [round(y_scale * edge) for edge in (view.top, view.top + view.height)]
    xs = [left + round(x_scale * edge) for edge in (view.left, view.left + view.width)]
    return View(ys[0], xs[0], ys[1] - ys[0], xs[1] - xs[0], view.rows, view.columns, view.separators, view.time)


def _edges(start: int, length: int, cells: int) -> np.ndarray:
    edges: np.ndarray = np.rint(np.linspace(start, start + length, cells + 1)).astype(np.int64)
    return edges


class Panel(NamedTuple):
    """One picture with its title and caption."""

    title: str
    caption: str
    picture: Image.Image


def draw_kept_tokens(canvas: TokenCanvas, kept: Sequence[tuple[str, np.ndarray]], caches: Sequence[np.ndarray] = ()) -> Image.Image:
    """Draw the panels of `kept_token_panels` side by side."""
    return join_panels(kept_token_panels(canvas, kept, caches))


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
        panels.append(Panel(title, caption, _outline(_highlight(canvas, mask), canvas.upsample(mask))))
    if caches:
        panels.append(_cache_panel(canvas, caches))
    return panels


def _cache_panel(canvas: TokenCanvas, caches: Sequence[np.ndarray]) -> Panel:
    masks = [_mask(CACHES, head, canvas) for heads in caches for head in heads]
    counts, share = sorted({int(mask.sum()) for mask in masks}), np.mean(masks, axis=0)
    amount = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    caption = f"kept {amount} of {share.size} in a head's cache ({share.mean():.0%})"
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
    weight = canvas.upsample(share.astype(np.float32))[..., None]
    pixels = np.asarray(canvas.picture, np.float32)
    grey = _DIM * (pixels @ _LUMA)[..., None] + _LIFT
    return Image.fromarray(np.rint(grey + weight * (pixels - grey)).astype(np.uint8))


def _outline(image: Image.Image, inside: np.ndarray) -> Image.Image:
    picture = np.array(image)
    picture[inside & ~_interior(inside)] = _LINE
    return Image.fromarray(picture)


def _interior(inside: np.ndarray) -> np.ndarray:
    # Pixels that are farther than the outline's width from dropped pixels and the image border.
    padded = Image.fromarray(np.pad(inside, _LINE_WIDTH).astype(np.uint8))
    eroded = np.asarray(padded.filter(ImageFilter.MinFilter(2 * _LINE_WIDTH + 1)), dtype=bool)
    return eroded[_LINE_WIDTH:-_LINE_WIDTH, _LINE_WIDTH:-_LINE_WIDTH]


def join_panels(panels: Sequence[Panel]) -> Image.Image:
    """Draw panels of equal size side by side, each below its title and caption."""
    width, height = max(MIN_WIDTH, panels[0][2].width), panels[0][2].height
    step = width + _MARGIN
    sheet = Image.new("RGB", (_MARGIN + step * len(panels), height + _CAPTION + 2 * _MARGIN), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for number, (title, caption, picture) in enumerate(panels):
        left = _MARGIN + number * step
        for y, text, size, ink in ((13, title, _TITLE_SIZE, _INK), (41, caption, _COUNT_SIZE, _FAINT)):
            fitted, font = _fit_text(pen, text, width, size)
            pen.text((left, _MARGIN + y), fitted, fill=ink, font=font, anchor="lm")
        sheet.paste(picture, (left, _MARGIN + _CAPTION))
    return sheet


def _fit_text(pen: ImageDraw.ImageDraw, text: str, width: int, size: int) -> tuple[str, Font]:
    # Reduce the font size first, then shorten the text.
    while size > _SMALLEST_SIZE and pen.textlength(text, _font(size)) > width:
        size -= 1
    while len(text) > 1 and pen.textlength(text, _font(size)) > width:
        text = text[:-2] + "…"
    return text, _font(size)


@cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size)
