"""Draw which visual tokens each cut kept: one panel a cut, one for all KV caches, beside the input image. Needs Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from edgeprune.errors import UsageError

MIN_WIDTH = 384  # of a panel; smaller images are enlarged to it
MAX_SIDE = 1024  # of the image in a panel; larger images are reduced to it
CACHES = "KV caches"  # title of the panel of all cache cuts

_MARGIN = 20
_CAPTION = 64  # height of the two text lines over a panel
_PAPER, _INK, _FAINT, _LINE = (250, 250, 248), (28, 30, 34), (110, 114, 122), (255, 196, 0)
_TITLE_SIZE, _COUNT_SIZE, _SMALLEST_SIZE = 22, 18, 11
_LINE_WIDTH = 2
_DIM, _LIFT = 0.28, 22.0  # a dropped pixel is its luminance, dimmed and lifted off black
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Panel(NamedTuple):
    """One picture with its two lines of text."""

    title: str
    caption: str
    picture: Image.Image


def draw_kept(
    image: Image.Image, kept: Sequence[tuple[str, np.ndarray]], grid: tuple[int, int], caches: Sequence[np.ndarray] = ()
) -> Image.Image:
    """Return the panels of `kept_panels` side by side."""
    return lay_out(kept_panels(image, kept, grid, caches))


def kept_panels(
    image: Image.Image, kept: Sequence[tuple[str, np.ndarray]], grid: tuple[int, int], caches: Sequence[np.ndarray] = ()
) -> list[Panel]:
    """Return the input and, for each cut (title, kept raster indices), a picture with what it kept in full colour.

    `grid` is (rows, columns) in visual tokens. `caches`: what each cut of a KV cache kept [heads, tokens]; in the one panel of
    them all a token is as bright as its share of the heads' caches. Raises UsageError for an index outside the grid.
    """
    tokens = grid[0] * grid[1]
    shown = _enlarge(image.convert("RGB"))
    panels = [Panel(f"input, {tokens} tokens", f"{grid[0]} x {grid[1]}", shown)]
    for title, indices in kept:
        mask = _mask(title, indices, grid)
        caption = f"kept {int(mask.sum())} of {tokens} ({mask.mean():.0%})"
        panels.append(Panel(title, caption, _outline(_highlight(shown, mask), mask)))
    if caches:
        panels.append(_cache_panel(shown, caches, grid))
    return panels


def _cache_panel(shown: Image.Image, caches: Sequence[np.ndarray], grid: tuple[int, int]) -> Panel:
    masks = [_mask(CACHES, head, grid) for heads in caches for head in heads]
    counts, share = sorted({int(mask.sum()) for mask in masks}), np.mean(masks, axis=0)
    amount = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    caption = f"kept {amount} of {share.size} in a head's cache ({share.mean():.0%})"
    return Panel(CACHES, caption, _highlight(shown, share))


def _mask(title: str, indices: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    flat = np.asarray(indices).reshape(-1)
    tokens = grid[0] * grid[1]
    if flat.size and (flat.dtype.kind not in "iu" or flat.min() < 0 or flat.max() >= tokens):
        raise UsageError(f"{title!r} has kept indices that are no tokens of a {grid[0]} x {grid[1]} grid.")
    mask = np.zeros(tokens, bool)
    mask[flat.astype(np.int64)] = True
    return mask.reshape(grid)


def _enlarge(image: Image.Image) -> Image.Image:
    scale = min(max(1.0, MIN_WIDTH / image.width), MAX_SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _highlight(image: Image.Image, share: np.ndarray) -> Image.Image:
    # From dim grey at share 0 to full colour at share 1.
    weight = _spread(share, image)[..., None].astype(np.float32)
    pixels = np.asarray(image, np.float32)
    grey = _DIM * (pixels @ _LUMA)[..., None] + _LIFT
    return Image.fromarray(np.rint(grey + weight * (pixels - grey)).astype(np.uint8))


def _outline(image: Image.Image, mask: np.ndarray) -> Image.Image:
    inside = _spread(mask, image)
    picture = np.array(image)
    picture[inside & ~_interior(inside)] = _LINE
    return Image.fromarray(picture)


def _spread(cells: np.ndarray, image: Image.Image) -> np.ndarray:
    # The value of every pixel's token.
    ys, xs = _edges(image.height, cells.shape[0]), _edges(image.width, cells.shape[1])
    return np.repeat(np.repeat(cells, np.diff(ys), axis=0), np.diff(xs), axis=1)


def _edges(length: int, cells: int) -> np.ndarray:
    edges: np.ndarray = np.rint(np.linspace(0, length, cells + 1)).astype(np.int64)
    return edges


def _interior(inside: np.ndarray) -> np.ndarray:
    # Pixels with no dropped pixel, and no rim of the image, within the outline's width.
    padded = Image.fromarray(np.pad(inside, _LINE_WIDTH).astype(np.uint8))
    eroded = np.asarray(padded.filter(ImageFilter.MinFilter(2 * _LINE_WIDTH + 1)), dtype=bool)
    return eroded[_LINE_WIDTH:-_LINE_WIDTH, _LINE_WIDTH:-_LINE_WIDTH]


def lay_out(panels: Sequence[Panel]) -> Image.Image:
    """Return panels of one size side by side, each under its text."""
    width, height = max(MIN_WIDTH, panels[0][2].width), panels[0][2].height
    step = width + _MARGIN
    sheet = Image.new("RGB", (_MARGIN + step * len(panels), height + _CAPTION + 2 * _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (title, caption, picture) in enumerate(panels):
        left = _MARGIN + number * step
        for y, text, size, ink in ((13, title, _TITLE_SIZE, _INK), (41, caption, _COUNT_SIZE, _FAINT)):
            fitted, font = _fitted(pen, text, width, size)
            pen.text((left, _MARGIN + y), fitted, fill=ink, font=font, anchor="lm")
        sheet.paste(picture, (left, _MARGIN + _CAPTION))
    return sheet


def _fitted(pen: ImageDraw.ImageDraw, text: str, room: int, size: int) -> tuple[str, Font]:
    # Smaller letters first, then fewer.
    while size > _SMALLEST_SIZE and pen.textlength(text, _font(size)) > room:
        size -= 1
    while len(text) > 1 and pen.textlength(text, _font(size)) > room:
        text = text[:-2] + "…"
    return text, _font(size)


@cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size)
