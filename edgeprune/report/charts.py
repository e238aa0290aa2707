"""The charts of a report as inline SVG. This module computes only layout and colours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from edgeprune.calibration.search.pareto import Curve, Point
from edgeprune.plan import KeepPlan
from edgeprune.report.canvas import FAINT, HEAT, HEAT_INK, INK, RULE, SERIES, drawn, tooltip

_WIDTH = 5.0  # inches of 72 SVG units: letters stay readable where the page is as narrow as a phone
_MARKERS = "osD^vP*X<>"
_BASELINES = ("random", "uniform", "resize")  # every method must beat these; drawn hollow
_MAX_NUMBERED_COLUMNS = 10  # of a chart over layers with a number in every cell
_MAX_LAYER_TICKS = 13
_MAX_MARKS = 40  # per line
_AXES = {
    "flops": "work on visual tokens in prefill",
    "kv": "visual KV cache",
    "ttft_ms": "time to first token, ms",
}


@dataclass(frozen=True)
class HeatMap:
    """Data of a heat map: `values` [rows, columns], formatted by `number`; NaN cells are empty. `depth` (same shape, 0 to 1) is the
    colour intensity.
    """

    values: np.ndarray
    depth: np.ndarray
    rows: Sequence[str]
    row_title: str
    number: Callable[[float], str]


def budgets(plan: KeepPlan) -> Markup:
    """Draw the visual tokens of each layer in prefill and in the KV cache as two bars."""
    layers, tokens = range(plan.layers), plan.geometry.tokens

    def draw(axes: Axes) -> None:
        axes.axhline(tokens, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), label=f"unpruned: {tokens}")
        bars = (("in prefill", plan.tokens_at_layer, 0.86, 0.32), ("in the KV cache", plan.tokens_cached, 0.46, 1.0))
        for label, count, width, alpha in bars:
            drawing = axes.bar(layers, [count(layer) for layer in layers], width, color=SERIES[0], alpha=alpha, label=label)
            for layer, bar in enumerate(drawing):
                bar.set_gid(tooltip(f"layer {layer}: {count(layer)} {label}"))
        if plan.layers <= _MAX_NUMBERED_COLUMNS:
            _numbers(axes, plan)
        axes.set(ylabel="visual tokens", ylim=(0, tokens * 1.08), xlim=(-0.6, plan.layers - 0.4))
        _layer_axis(axes, plan.layers)
        axes.grid(axis="y")
        _legend(axes, 3)

    return drawn("budgets", "Visual tokens per decoder layer", (_WIDTH, 3.2), draw)


def _numbers(axes: Axes, plan: KeepPlan) -> None:
    for layer in range(plan.layers):
        for count in {plan.tokens_at_layer(layer), plan.tokens_cached(layer)}:
            axes.annotate(f"{count}", (layer, count), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=9)


def decode_shares(schedule: Sequence[float] | None, answers: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """Draw the share of the visual KV cache that each decode step reads, for a schedule and for measured answers."""
    styles = list(zip(SERIES[1:], ("o", "s"), strict=False))

    def draw(axes: Axes) -> None:
        if schedule is not None:
            line = axes.step(
                range(len(schedule)), schedule, where="post", color=SERIES[0], linewidth=5, alpha=0.35, label="schedule"
            )
            line[0].set_gid(tooltip(f"schedule over {len(schedule)} steps"))
        for (label, shares), (color, marker) in zip(answers, styles, strict=False):
            axes.plot(range(len(shares)), shares, color=color, linewidth=1.5, drawstyle="steps-post", label=label)
            for step, share in enumerate(shares):
                axes.plot(step, share, marker, color=color, markersize=4, gid=tooltip(f"{label}, step {step}: {share:.0%}"))
        axes.set(xlabel="decode step", ylabel="share kept", ylim=(-0.03, 1.05))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        _percent(axes)
        _legend(axes, 3)

    return drawn("decode", "Share of the visual cache by decode step", (_WIDTH, 2.6), draw)


def attention_by_layer(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> Markup:
    """Draw each layer's mean attention to vision [layers], with the band between its quartiles."""
    layers = range(len(mean))

    def draw(axes: Axes) -> None:
        axes.fill_between(layers, low, high, color=SERIES[0], alpha=0.22, linewidth=0, label="middle half of the samples")
        axes.plot(layers, mean, color=SERIES[0], linewidth=1.8, label="mean")
        for layer, value in enumerate(mean):
            text = f"layer {layer}: mean {value:.1%}, quartiles {low[layer]:.1%} and {high[layer]:.1%}"
            axes.plot(layer, value, "o", color=SERIES[0], markersize=5, gid=tooltip(text))
        axes.set(ylabel="attention to vision", ylim=(0, min(1.0, 0.01 + 1.15 * max(high.max(), mean.max()))))
        _layer_axis(axes, len(mean))
        _percent(axes)
        _legend(axes, 2)

    return drawn("attention", "Attention to vision over layers", (_WIDTH, 2.9), draw)


def attention_by_step(split: np.ndarray, names: Sequence[str]) -> Markup:
    """Draw the attention split at each decode step [steps, names], one line per name; NaN steps are omitted."""
    steps = np.flatnonzero(~np.isnan(split).any(axis=1))
    styles = zip(SERIES, ("-", "--", "-.", ":"), cycle("os^D"), strict=False)

    def draw(axes: Axes) -> None:
        for column, (name, (color, dashes, marker)) in enumerate(zip(names, styles, strict=False)):
            values = split[steps, column]
            line = axes.plot(steps, values, dashes, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=name)
            line[0].set_markevery(1 + len(steps) // _MAX_MARKS)
            line[0].set_gid(tooltip(f"{name}, {len(steps)} steps: from {values[0]:.0%} to {values[-1]:.0%}"))
        axes.set(xlabel="decode step", ylabel="share of attention", ylim=(0, 1))
        _percent(axes)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        _legend(axes, 2)

    return drawn("split", "Attention split over decode steps", (_WIDTH, 3.0), draw)


def heat_map(name: str, title: str, heat: HeatMap) -> Markup:
    """Draw a heat map over the decoder layers."""
    rows, columns = heat.values.shape

    def draw(axes: Axes) -> None:
        for (row, column), value in np.ndenumerate(heat.values):
            _cell(axes, heat, row, column, float(value))
        axes.set(ylabel=heat.row_title, xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
        axes.set_yticks(range(rows), heat.rows)
        _layer_axis(axes, columns)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)

    return drawn(name, title, (_WIDTH, 0.9 + 0.32 * rows), draw)


def _cell(axes: Axes, heat: HeatMap, row: int, column: int, value: float) -> None:
    depth = float(heat.depth[row, column])
    box = Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, linewidth=0)
    if np.isnan(value):
        box.set(facecolor=RULE, alpha=0.35)
    else:
        text = heat.number(value)
        box.set(
            facecolor=HEAT, alpha=0.04 + 0.96 * depth, gid=tooltip(f"layer {column}, {heat.row_title} {heat.rows[row]}: {text}")
        )
        if heat.values.shape[1] <= _MAX_NUMBERED_COLUMNS:
            ink = HEAT_INK if depth > 0.7 else INK
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color=ink)
    axes.add_patch(box)


def trade_off(curve: Curve, plan: KeepPlan) -> Markup:
    """Draw the score of every measured plan over its cost, one series per group; the chosen plan and this plan are ringed."""
    groups = sorted({point.group for point in curve.points}, key=lambda group: (group in _BASELINES, group))

    def draw(axes: Axes) -> None:
        front = curve.front()
        costs, scores = [point.cost(curve.axis) for point in front], [point.score for point in front]
        line = axes.step(costs, scores, where="post", color=INK, linewidth=1.2, label="best by cost")
        line[0].set_gid(tooltip(f"front of {len(front)} points"))
        for index, group in enumerate(groups):
            _series(axes, curve, group, index)
        _ring(axes, curve, plan)
        axes.set(xlabel=_AXES[curve.axis], ylabel="agreement with the unpruned model")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if curve.axis != "ttft_ms":
            axes.set_xlim(0, 1.02)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid()
        axes.figure.legend(loc="outside lower center", ncols=2)

    return drawn("curve", "Score over cost", (_WIDTH, 3.3 + 0.22 * (3 + len(groups)) / 2), draw)


def _series(axes: Axes, curve: Curve, group: str, index: int) -> None:
    hollow = group in _BASELINES
    color, marker = (FAINT if hollow else SERIES[index % len(SERIES)]), _MARKERS[index % len(_MARKERS)]
    style: dict[str, Any] = {"color": color, "markerfacecolor": "none" if hollow else color, "markersize": 7.0, "linestyle": "none"}
    for number, point in enumerate(point for point in curve.points if point.group == group):
        style["label"] = group if number == 0 else None  # one legend entry per group
        text = tooltip(
            f"{_point_label(point)}: {_format_cost(point, curve.axis)}, score {point.score:.1%} over {point.samples} samples"
        )
        axes.plot(point.cost(curve.axis), point.score, marker, gid=text, **style)


def _ring(axes: Axes, curve: Curve, plan: KeepPlan) -> None:
    chosen = None if curve.chosen is None else curve.points[curve.chosen]
    mine = next((point for point in curve.points if point.plan == plan), None)
    if chosen is not None:
        label = "chosen: this plan" if chosen.plan == plan else "chosen"
        _circle(axes, chosen, curve.axis, label, "-")
    if mine is not None and (chosen is None or chosen.plan != plan):
        _circle(axes, mine, curve.axis, "this plan", (0, (2, 2)))


def _circle(axes: Axes, point: Point, axis: str, label: str, dashes: str | tuple[int, tuple[int, int]]) -> None:
    style: dict[str, Any] = {"facecolor": "none", "edgecolor": INK, "linewidth": 1.6, "linestyle": [dashes], "zorder": 5}
    axes.scatter([point.cost(axis)], [point.score], 210, label=label, gid=tooltip(f"{label}: {_point_label(point)}"), **style)


def _point_label(point: Point) -> str:
    return point.name if point.group in (point.name, "") else f"{point.name} ({point.group})"


def _format_cost(point: Point, axis: str) -> str:
    return f"{point.cost(axis):.1f} ms" if axis == "ttft_ms" else f"{axis} {point.cost(axis):.1%}"


def _layer_axis(axes: Axes, layers: int) -> None:
    axes.set_xlabel("decoder layer")
    axes.set_xticks(range(0, layers, 1 + layers // _MAX_LAYER_TICKS))


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.4)


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.grid(axis="y")
