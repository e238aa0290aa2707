"""Draw the trade-off of every plan in a table that papers.py wrote: what is right, over the share of the visual work that is kept.

    python examples/papers/draw.py docs/papers.md docs/pareto.png

Plans that drop tokens before or in prefill stand on the left, over their share of its work. Those that only thin KV caches stand on
the right, over what the decode steps read of them. The picture's description is the sha256 of the table's lines.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

SCORES = {"short answers": "short answers right", "facts described": "facts described right"}
WORK, READ = "visual tokens' prefill work", "read"
AXES = {WORK: "work on visual tokens in prefill, of the unpruned model's", READ: "visual KV cache read, of the unpruned model's"}
TITLES = {WORK: "Tokens dropped before or in prefill", READ: "KV caches thinned after prefill"}
BASELINES = ("random", "uniform", "resize")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#7a3db8", "#b00020")  # told apart by the colour-blind
MARKERS, BASELINE_MARKERS = "osD^vph8", "x+1"


@dataclass(frozen=True)
class Row:
    """One plan of the table: the `method`, and the numbers of each column as shares."""

    method: str
    shares: dict[str, float]


def table_of(text: str) -> str:
    """Return the lines of the table in a Markdown text that begins with the column "plan"."""
    return text[text.index("| plan |") :].partition("\n\n")[0].strip()


def read_rows(table: str) -> list[Row]:
    """Return the rows of a table."""
    head, _, *body = ([cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines())
    return [Row(_method(cells[0]), {name: _share(cell) for name, cell in zip(head[1:], cells[1:], strict=True)}) for cells in body]


def _method(plan: str) -> str:
    # "plphp-30-last-row" is plphp, with another rule, at 30 %.
    return re.sub(r"-\d+(?=-|$)", "", plan)


def _share(cell: str) -> float:
    return float(cell.rstrip("%")) / 100 if cell.endswith("%") else float("nan")


def draw(table: str, path: Path) -> None:
    """Write the picture of a table."""
    rows = read_rows(table)
    (whole,) = (row for row in rows if row.method == "none")
    pruned = [row for row in rows if row is not whole]
    columns = {WORK: [row for row in pruned if row.shares[WORK] < 1], READ: [row for row in pruned if row.shares[WORK] == 1]}
    figure = Figure(figsize=(10, 7.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, (axis, shown) in enumerate(columns.items()):
        for row, score in enumerate(SCORES):
            _draw_panel(panels[row, column], shown, whole, axis, score)
        panels[0, column].set_title(TITLES[axis], fontsize=12)
        panels[1, column].set_xlabel(AXES[axis])
        panels[1, column].legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
    for row, label in enumerate(SCORES.values()):
        panels[row, 0].set_ylabel(label)
    figure.savefig(path, dpi=120, metadata={"Description": digest_of(table)})


def digest_of(table: str) -> str:
    """Return what says which table a picture shows."""
    return hashlib.sha256(table.encode()).hexdigest()


def _draw_panel(panel: Axes, rows: Sequence[Row], whole: Row, axis: str, score: str) -> None:
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
    return method.startswith(BASELINES)


def _style(method: str, methods: Sequence[str]) -> dict[str, Any]:
    alike = [each for each in methods if _is_baseline(each) == _is_baseline(method)]
    index = alike.index(method)
    if _is_baseline(method):
        return {"color": "#777777", "linestyle": "--", "marker": BASELINE_MARKERS[index % 3], "markersize": 8}
    mark = {"marker": MARKERS[index % len(MARKERS)], "markersize": 9, "markeredgewidth": 1.6, "markerfacecolor": "none"}
    return {"color": COLORS[index % len(COLORS)], **mark}  # hollow: what lies below is seen


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="a Markdown file with the table")
    parser.add_argument("picture", type=Path)
    request = parser.parse_args()
    draw(table_of(request.table.read_text(encoding="utf-8")), request.picture)


if __name__ == "__main__":
    main()
