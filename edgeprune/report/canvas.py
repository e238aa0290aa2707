"""From a matplotlib figure to inline SVG that wears the page's own colours and letters, light or dark.

Charts are drawn in stand-in colours, which become the page's CSS variables; an artist whose gid is a `tooltip` shows it under the
pointer. pyplot, which keeps figures alive globally, is never imported.
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

# No chart uses these for themselves: matplotlib leaves out plain black, which is SVG's default.
INK, FAINT, RULE, HEAT, HEAT_INK = "#010201", "#010202", "#010203", "#010204", "#010205"
SERIES = tuple(f"#0103{index:02x}" for index in range(1, 7))
_VARIABLES = {INK: "ink", FAINT: "faint", RULE: "rule", HEAT: "heat", HEAT_INK: "heat-ink"}
_VARIABLES |= {color: f"series-{index}" for index, color in enumerate(SERIES, start=1)}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a name is a dollar
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
    "hatch.color": RULE,
}
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
_TIP = "tip: "


def tooltip(text: str) -> str:
    """Return the gid that shows a text under the pointer."""
    return _TIP + text


def drawn(name: str, title: str, size: tuple[float, float], draw: Callable[[Axes], None]) -> Markup:
    """Return the SVG of what `draw` puts on one pair of axes; `name` keeps its ids apart from those of other charts."""
    style: Any = {**_STYLE, "svg.hashsalt": name}  # newer matplotlibs name every key in the type
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    return _inlined(file.getvalue(), title)


def _inlined(document: str, title: str) -> Markup:
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(rf'<g id="{_TIP}([^"]*)"', r"<g><title>\1</title", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    label = Markup('<svg role="img" aria-label="{}"').format(title)
    # Made above by matplotlib, which escapes every text.
    return Markup(svg.rstrip().replace("<svg", label, 1))
