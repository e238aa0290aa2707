"""Draw a benchmark: stages of TTFT, time per token over context length, and TTFT over visual tokens. Needs matplotlib."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from edgeprune.benchmark.results import STAGES
from edgeprune.benchmark.run import Benchmark
from edgeprune.io.files import write_bytes

_COLORS = ("#9aa5b1", "#2f6db5", "#e0952f", "#3a9a6b")  # of the stages, in order
_LINES = ("#1f4e8c", "#5d6670", "#c9622b", "#3a9a6b", "#8a4fa3", "#b03a48")
_MARKERS = "os^Dv<"
_STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
    "legend.frameon": False,
    "font.size": 10.0,
}


def draw(result: Benchmark, path: Path) -> None:
    """Write the figure in the format of the suffix."""
    sweeps = [draw_panel for draw_panel, data in ((_draw_contexts, result.request.contexts), (_draw_growth, result.growth)) if data]
    panels = 1 + len(sweeps)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6 * panels, 1.9 + 0.55 * max(len(result.variants), 3)), layout="constrained", dpi=150)
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _draw_stages(axes[0], result)
        for draw_panel, panel in zip(sweeps, axes[1:], strict=True):
            draw_panel(panel, result)
        figure.savefig(encoded := BytesIO(), format=path.suffix[1:])
    write_bytes(path, encoded.getvalue())


def _draw_stages(axes: Axes, result: Benchmark) -> None:
    names = [_short_name(variant.name) for variant in result.variants]
    left = [0.0] * len(names)
    for stage, color in zip(STAGES, _COLORS, strict=True):
        widths = [variant.costs[stage].p50 for variant in result.variants]
        if any(widths):
            axes.barh(names, widths, left=left, color=color, label=stage.removesuffix("_ms"), height=0.62)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for index, (end, variant) in enumerate(zip(left, result.variants, strict=True)):
        ratio = "" if variant.name == result.request.baseline else f" ({variant.ratios['ttft_ms']:.2f}x)"
        axes.text(end, index, f" {variant.costs['ttft_ms'].p50:.1f}{ratio}", va="center")
    axes.set(xlabel="time to first token, ms: its median, beside those of its stages", xlim=(0, 1.3 * max(left)))
    axes.invert_yaxis()
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), handlelength=1.0, columnspacing=1.2)


def _draw_contexts(axes: Axes, result: Benchmark) -> None:
    for index, variant in enumerate(result.variants):
        keys = [point.keys for point in variant.contexts]
        times = [point.ms_per_token.p50 for point in variant.contexts]
        color, marker = _LINES[index % len(_LINES)], _MARKERS[index % len(_MARKERS)]
        axes.plot(keys, times, label=_short_name(variant.name), color=color, marker=marker, linewidth=1.6, markersize=5)
    axes.set(xlabel="text tokens in the cache, the image besides", ylabel="ms per token (medians)", ylim=(0, None))
    axes.grid(axis="y", color="#e3e6ea")
    columns = min(len(result.variants), 4)
    axes.legend(ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0), handlelength=1.4, columnspacing=1.2)


def _draw_growth(axes: Axes, result: Benchmark) -> None:
    kept = [point.kept for point in result.growth]
    for name, color, marker in (("ttft_ms", _LINES[0], "o"), ("prefill_ms", _LINES[2], "s")):
        times = [getattr(point, name).p50 for point in result.growth]
        axes.plot(kept, times, label="TTFT" if name == "ttft_ms" else "prefill", color=color, marker=marker, linewidth=1.6)
    if line := result.line:
        fit = [line.ms_at_none + line.ms_per_token * point.tokens for point in result.growth]
        axes.plot(kept, fit, label=f"prefill as a line, within {line.farthest:.0%}", color=_LINES[1], linestyle=":", linewidth=1.4)
    axes.set(xlabel="visual tokens in the decoder, evenly chosen", ylabel="ms (medians)", xlim=(0, None), ylim=(0, None))
    axes.grid(axis="y", color="#e3e6ea")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), handlelength=1.4, columnspacing=1.2)


def _short_name(name: str) -> str:
    # The last component of a path.
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2]
