"""Draw which visual tokens each cut kept: one panel a cut, one for all KV caches, beside the input image. Needs Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from edgeprune.errors import UsageError
from edgeprune.runtime.board import MIN_WIDTH, Board

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


def draw_kept(board: Board, kept: Sequence[tuple[str, np.ndarray]], caches: Sequence[np.ndarray] = ()) -> Image.Image:
    """Return the panels of `kept_panels` side by side."""
    return lay_out(kept_panels(board, kept, caches))


def kept_panels(board: Board, kept: Sequence[tuple[str, np.ndarray]], caches: Sequence[np.ndarray] = ()) -> list[Panel]:
    """Return the input and, for each cut (title, kept indices), a picture with what it kept in full colour.

    `caches`: what each cut of a KV cache kept [heads, tokens]; in the one panel of them all a token is as bright as its share of
    the heads' caches. Raises UsageError for an index that is no token of the board.
    """
    panels = [Panel(f"input, {board.tokens} tokens", board.shape, board.picture)]
    for title, indices in kept:
        mask = _mask(title, indices, board)
        caption = f"kept {int(mask.sum())} of {board.tokens} ({mask.mean():.0%})"
        panels.append(Panel(title, caption, _outline(_highlight(board, mask), board.spread(mask))))
    if caches:
        panels.append(_cache_panel(board, caches))
    return panels


def _cache_panel(board: Board, caches: Sequence[np.ndarray]) -> Panel:
    masks = [_mask(CACHES, head, board) for heads in caches for head in heads]
    counts, share = sorted({int(mask.sum()) for mask in masks}), np.mean(masks, axis=0)
    amount = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    caption = f"kept {amount} of {share.size} in a head's cache ({share.mean():.0%})"
    return Panel(CACHES, caption, _highlight(board, share))


def _mask(title: str, indices: np.ndarray, board: Board) -> np.ndarray:
    flat = np.asarray(indices).reshape(-1)
    if flat.size and (flat.dtype.kind not in "iu" or flat.min() < 0 or flat.max() >= board.tokens):
        raise UsageError(f"{title!r} has kept indices that are none of the image's {board.tokens} visual tokens.")
    mask = np.zeros(board.tokens, bool)
    mask[flat.astype(np.int64)] = True
    return mask


def _highlight(board: Board, share: np.ndarray) -> Image.Image:
    # From dim grey at share 0 to full colour at share 1.
    weight = board.spread(share.astype(np.float32))[..., None]
    pixels = np.asarray(board.picture, np.float32)
    grey = _DIM * (pixels @ _LUMA)[..., None] + _LIFT
    return Image.fromarray(np.rint(grey + weight * (pixels - grey)).astype(np.uint8))


def _outline(image: Image.Image, inside: np.ndarray) -> Image.Image:
    picture = np.array(image)
    picture[inside & ~_interior(inside)] = _LINE
    return Image.fromarray(picture)


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
