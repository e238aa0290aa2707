"""Print evaluations and comparisons as tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprune.calibration.options import RESULTS
from edgeprune.cli.output.basic import show_json, show_skipped, show_table

if TYPE_CHECKING:
    from edgeprune.calibration.compare import Entry
    from edgeprune.calibration.data.samples import BadSampleError
    from edgeprune.calibration.evaluation import EvalReport
    from edgeprune.calibration.metrics import Metric

_MEASURES = {"f1": "F1", "yes_ratio": 'answers "yes"'}


def _evaluation_lines(kind: str, row: Mapping[str, Any], columns: Sequence[str], metric: Metric) -> list[list[str]]:
    # A kind with several measures has a line for each, all others one.
    shown = "{:.1%}" if metric.percent else "{:.3f}"
    measures = list(metric.measures_of(kind))
    if len(measures) == 1:
        forms = [shown if name in ("pruned", "unpruned") else "{:.1%}" for name in columns]
        return [[kind, str(row["asked"]), *(form.format(row[name]) for form, name in zip(forms, columns, strict=True))]]
    of = " of facts" if "accuracy" not in measures else ""
    lines = []
    for number, measure in enumerate(measures):
        whole = row if number == 0 else {}
        cells = [row[measure].get(name, whole.get(name)) for name in columns]
        label = f"{kind}: {_MEASURES.get(measure, measure)}{of}"
        lines.append([label, str(row["asked"]) if whole else "", *("" if cell is None else f"{cell:.1%}" for cell in cells)])
    return lines


def show_evaluation(report: EvalReport, skipped: Sequence[BadSampleError], as_json: bool) -> None:
    """Print the scores of each kind of question, then the costs of an answer; on stderr the samples that were left out."""
    show_skipped(skipped)
    data = {**report.to_dict(), "skipped": [str(error) for error in skipped]}
    if as_json:
        show_json(data)
        return
    columns = [name for name in ("pruned", "unpruned", "agreement", "visual_reads") if name in next(iter(data["kinds"].values()))]
    rows = [line for kind, row in data["kinds"].items() for line in _evaluation_lines(kind, row, columns, report.metric)]
    click.echo(f"metric: {report.metric.name}\n")
    show_table(["kind", "asked", *(name.replace("_", " ") for name in columns)], rows, as_json=False)
    costs = [
        [name, f"{c['ttft_ms']:.1f}", f"{c['ms_per_token']:.2f}", f"{c['kv_bytes'] / 1024:.0f}", f"{c['visual_kv']:.0%}"]
        for name, c in data["cost"].items()
    ]
    click.echo()
    show_table(["cost (median)", "TTFT ms", "ms per token", "KV KiB", "visual KV"], costs, as_json=False)


def show_comparison(
    plans: Sequence[str],
    columns: Mapping[str, Sequence[float | None]],
    without: Sequence[Entry],
    skipped: Sequence[BadSampleError],
    folder: Path,
    as_json: bool,
) -> None:
    """Print the table of a comparison, why some plans are missing, and where everything is."""
    show_skipped(skipped)
    if as_json:
        show_json(json.loads((folder / RESULTS).read_text(encoding="utf-8")) | {"skipped": [str(error) for error in skipped]})
        return
    rows = [[plan, *(_percent(cells[number]) for cells in columns.values())] for number, plan in enumerate(plans)]
    show_table(["plan", *columns], rows, as_json=False)
    for entry in without:
        click.echo(f"{entry.name}: {entry.reason}")
    click.echo(f"\nTable, picture, plans and answers are in {folder}.")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
