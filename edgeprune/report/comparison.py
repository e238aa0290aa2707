"""The picture of a comparison of plans: what is right, over the share of the visual work that is kept. Needs matplotlib.

Plans that drop tokens before or in prefill stand on the left, over their share of its work. Those that only thin KV caches stand on
the right, over what the decode steps read of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from edgeprune.io.files import write_bytes

NONE, WORK, READ = "none", "visual tokens' prefill work", "read"  # the unpruned row; columns of costs
_COSTS = ("agreement", "vision encoder's work", WORK, "visual KV held", READ)  # and agreement: columns that are no scores
_AXES = {WORK: "visual tokens in prefill, of the unpruned model's", READ: "visual KV cache read, of the unpruned model's"}
_TITLES = {WORK: "Tokens dropped before or in prefill", READ: "KV caches thinned after prefill"}
_BASELINES = ("random", "uniform", "resize")
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#7a3db8", "#b00020")  # told apart by the colour-blind
_MARKERS, _BASELINE_MARKERS = "osD^vph8*X<>dPH", "x+1"
_MOST_SCORES = 2  # panels, one above the other


@dataclass(frozen=True)
class _Row:
    method: str
    shares: dict[str, float]


def draw(plans: Sequence[str], columns: Mapping[str, Sequence[float | None]], path: Path, description: str = "") -> None:
    """Write the picture of a table in the format of the suffix.

    `plans`: the names of the rows, one of them NONE; a name ends with its share in per cent, as "fastv-25" does, or has it before a
    further word. `columns`: by title the shares of all rows. `description`: text of the file.
    """
    rows = [
        _Row(_method(plan), {title: _number(cells[number]) for title, cells in columns.items()})
        for number, plan in enumerate(plans)
    ]
    (whole,) = (row for row in rows if row.method == NONE)
    pruned = [row for row in rows if row is not whole]
    shown = {WORK: [row for row in pruned if row.shares[WORK] < 1], READ: [row for row in pruned if row.shares[WORK] >= 1]}
    shown = {axis: some for axis, some in shown.items() if some}
    scores = [title for title in columns if title not in _COSTS][:_MOST_SCORES]
    figure = Figure(figsize=(max(5.6 * len(shown), 6.5), 1.0 + 3.2 * len(scores)), layout="constrained")
    panels = figure.subplots(len(scores), max(len(shown), 1), sharex=True, sharey="row", squeeze=False)
    for column, (axis, some) in enumerate(shown.items()):
        for row, score in enumerate(scores):
            _draw_panel(panels[row, column], some, whole, axis, score)
        panels[0, column].set_title(_TITLES[axis], fontsize=12)
        panels[-1, column].set_xlabel(_AXES[axis])
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
        panels[-1, column].legend(**below, ncols=3, frameon=False, fontsize=9, columnspacing=1.0)
    for row, score in enumerate(scores):
        panels[row, 0].set_ylabel(score)
    figure.savefig(encoded := BytesIO(), dpi=120, format=path.suffix[1:], metadata={"Description": description})
    write_bytes(path, encoded.getvalue())


def _method(plan: str) -> str:
    # "plphp-30-last-row" is plphp, with another rule, at 30 %.
    return re.sub(r"-\d+(\.\d+)?(?=-|$)", "", plan)


def _number(share: float | None) -> float:
    return float("nan") if share is None else share


def _draw_panel(panel: Axes, rows: Sequence[_Row], whole: _Row, axis: str, score: str) -> None:
    methods = list(dict.fromkeys(row.method for row in rows))
    end = (1.0, whole.shares[score])
    for method in sorted(methods, key=_is_baseline):
        points = sorted((row.shares[axis], row.shares[score]) for row in rows if row.method == method)
        style = _style(method, methods)
        panel.plot(*zip(points[-1], end, strict=True), color=style["color"], linewidth=0.8, linestyle=":")
        panel.plot(*zip(*points, strict=True), label=method, **style)
    panel.plot(*end, "s", color="black", label="unpruned", clip_on=False)
    panel.set(xlim=(0, 1.01), ylim=(0, 1.04))
    for side in (panel.xaxis, panel.yaxis):
        side.set_major_formatter(PercentFormatter(1.0))
    panel.grid(color="#dddddd", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _is_baseline(method: str) -> bool:
    return method.startswith(_BASELINES)


def _style(method: str, methods: Sequence[str]) -> dict[str, Any]:
    alike = [each for each in methods if _is_baseline(each) == _is_baseline(method)]
    index = alike.index(method)
    if _is_baseline(method):
        return {"color": "#777777", "linestyle": "--", "marker": _BASELINE_MARKERS[index % 3], "markersize": 8}
    mark = {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 9, "markeredgewidth": 1.6, "markerfacecolor": "none"}
    return {"color": _COLORS[index % len(_COLORS)], **mark}  # hollow: what lies below is seen
