"""Convert matplotlib figures to inline SVG with the page's own colours and font, in light and dark mode.

Charts use placeholder colours, which are replaced by the page's CSS variables. An artist whose gid is made by `tooltip` shows that
text under the pointer. pyplot is not imported, because it keeps figures alive globally.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Placeholder colours. Not plain black: matplotlib omits it because it is SVG's default.
INK, FAINT, RULE, HEAT, HEAT_INK = "#010201", "#010202", "#010203", "#010204", "#010205"
SERIES = tuple(f"#0103{index:02x}" for index in range(1, 7))
_VARIABLES = {INK: "ink", FAINT: "faint", RULE: "rule", HEAT: "heat", HEAT_INK: "heat-ink"}
_VARIABLES |= {color: f"series-{index}" for index, color in enumerate(SERIES, start=1)}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is not math
    "axes.unicode_minus": True,
    "font.size": 11.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.columnspacing": 1.0,
    "legend.handlelength": 1.4,
    "legend.handletextpad": 0.5,
    "hatch.color": RULE,
}
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
_TIP = "tip: "


def tooltip(text: str) -> str:
    """Return the gid that makes an artist show a text under the pointer."""
    return _TIP + text


def drawn(name: str, title: str, size: tuple[float, float], draw: Callable[[Axes], None]) -> Markup:
    """Return the SVG of a figure that `draw` draws on one pair of axes; `name` makes its ids unique in the page."""
    style: Any = {**_STYLE, "svg.hashsalt": name}  # Any: newer matplotlib types list every key
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    return _to_inline(file.getvalue(), title)


def _to_inline(document: str, title: str) -> Markup:
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(rf'<g id="{_TIP}([^"]*)"', r"<g><title>\1</title", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    label = Markup('<svg role="img" aria-label="{}"').format(title)
    # Safe as Markup: matplotlib escapes every text.
    return Markup(svg.rstrip().replace("<svg", label, 1))
