"""Put the panels of kept tokens on one sheet: question and answer above them, rows of panels, and a legend."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from edgeprune.runtime.media.overlay import BACKGROUND, CACHES, FAINT, INK, LINE, MAX_ROW, MIN_WIDTH, Font, Panel, font

MARGIN = 20
CAPTION = 64  # height of the two text lines above a panel
_TITLE_SIZE, _COUNT_SIZE, _SMALLEST_SIZE = 22, 18, 11
_TEXT_SIZE, _TEXT_LINE = 20, 28
_MAX_LINES = 6  # of a question or an answer; longer ones end in dots
_SWATCH = 22
_KEPT, _DROPPED = (196, 178, 148), (70, 70, 70)  # a patch of the legend in colour, and in the dim grey of dropped ones


def join_panels(panels: Sequence[Panel], *, images: int = 1, question: str = "", answer: str = "") -> Image.Image:
    """Draw panels in rows, each below its title and caption, with a legend if anything was cut.

    `images`: the number of images that the panels belong to; each begins a row. `question` and `answer` stand above them.
    """
    rows = _rows(panels, images)
    width = MARGIN + max(sum(_width(panel) + MARGIN for panel in row) for row in rows)
    texts = [(name, text) for name, text in (("Question", question), ("Answer", answer)) if text]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    written = [(name, _wrap(pen, text, width - 2 * MARGIN - _indent(pen))) for name, text in texts]
    above = sum(_TEXT_LINE * len(lines) for _, lines in written) + (MARGIN if written else 0)
    height = MARGIN + above + sum(_height(row) for row in rows)
    cut = len(panels) > images
    sheet = Image.new("RGB", (width, height + (_SWATCH + MARGIN) * cut), BACKGROUND)
    _draw_texts(ImageDraw.Draw(sheet), written)
    top = MARGIN + above
    for row in rows:
        _draw_row(sheet, row, top)
        top += _height(row)
    if cut:
        _draw_legend(sheet, top, brightness=any(panel.title == CACHES for panel in panels))
    return sheet


def _rows(panels: Sequence[Panel], images: int) -> list[Sequence[Panel]]:
    each = len(panels) // images
    columns = max(1, (MAX_ROW + MARGIN) // (max(map(_width, panels)) + MARGIN))
    groups = [panels[begin : begin + each] for begin in range(0, len(panels), each)]
    return [group[begin : begin + columns] for group in groups for begin in range(0, each, columns)]


def _width(panel: Panel) -> int:
    return max(MIN_WIDTH, panel.picture.width)


def _height(row: Sequence[Panel]) -> int:
    return CAPTION + max(panel.picture.height for panel in row) + MARGIN


def _draw_texts(pen: ImageDraw.ImageDraw, written: Sequence[tuple[str, Sequence[str]]]) -> None:
    y = MARGIN + _TEXT_LINE // 2
    for name, lines in written:
        pen.text((MARGIN, y), name, fill=FAINT, font=font(_TEXT_SIZE), anchor="lm")
        for line in lines:
            pen.text((MARGIN + _indent(pen), y), line, fill=INK, font=font(_TEXT_SIZE), anchor="lm")
            y += _TEXT_LINE


def _indent(pen: ImageDraw.ImageDraw) -> int:
    return round(pen.textlength("Question", font(_TEXT_SIZE))) + MARGIN


def _draw_row(sheet: Image.Image, row: Sequence[Panel], top: int) -> None:
    pen, left = ImageDraw.Draw(sheet), MARGIN
    for panel in row:
        for y, text, size, ink in ((13, panel.title, _TITLE_SIZE, INK), (41, panel.caption, _COUNT_SIZE, FAINT)):
            fitted, letters = _fit_text(pen, text, _width(panel), size)
            pen.text((left, top + y), fitted, fill=ink, font=letters, anchor="lm")
        sheet.paste(panel.picture, (left, top + CAPTION))
        left += _width(panel) + MARGIN


def _draw_legend(sheet: Image.Image, top: int, *, brightness: bool) -> None:
    pen, x = ImageDraw.Draw(sheet), MARGIN
    entries = [("kept", _KEPT, LINE), ("dropped", _DROPPED, _DROPPED)]
    for text, fill, outline in entries:
        pen.rectangle((x, top, x + _SWATCH, top + _SWATCH), fill=fill, outline=outline, width=2)
        x = _draw_entry(pen, text, x + _SWATCH + 8, top)
    if brightness:
        for step in range(5):
            share = step / 4
            shade = tuple(round(dark + share * (bright - dark)) for dark, bright in zip(_DROPPED, _KEPT, strict=True))
            pen.rectangle((x, top, x + _SWATCH, top + _SWATCH), fill=shade)
            x += _SWATCH
        _draw_entry(pen, "kept by none to all of the KV heads", x + 8, top)


def _draw_entry(pen: ImageDraw.ImageDraw, text: str, x: int, top: int) -> int:
    # Returns where the next entry begins.
    pen.text((x, top + _SWATCH // 2), text, fill=FAINT, font=font(_COUNT_SIZE), anchor="lm")
    return x + round(pen.textlength(text, font(_COUNT_SIZE))) + MARGIN


def _wrap(pen: ImageDraw.ImageDraw, text: str, width: int) -> list[str]:
    lines = list[str]()
    for paragraph in text.splitlines() or [""]:
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and pen.textlength(longer, font(_TEXT_SIZE)) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES - 1], f"{lines[_MAX_LINES - 1]} …"]
    return [_shorten(pen, line, width, font(_TEXT_SIZE)) for line in lines]


def _fit_text(pen: ImageDraw.ImageDraw, text: str, width: int, size: int) -> tuple[str, Font]:
    # Reduce the font size first, then shorten the text.
    while size > _SMALLEST_SIZE and pen.textlength(text, font(size)) > width:
        size -= 1
    return _shorten(pen, text, width, font(size)), font(size)


def _shorten(pen: ImageDraw.ImageDraw, text: str, width: int, letters: Font) -> str:
    while len(text) > 1 and pen.textlength(text, letters) > width:
        text = text[:-2] + "…"
    return text
