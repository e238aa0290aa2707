"""The table of a comparison, and its numbers."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from contenders import Contender

HEAD = "| | precision | kept | tokens in | TTFT ms | vision ms | prefill ms | ms/token | CPU s | peak RSS GB | disk GB |"
COLUMNS = {"ttft_ms": ".0f", "vision_ms": ".0f", "prefill_ms": ".0f", "ms_per_token": ".1f", "cpu_s": ".1f"}


@dataclass
class Row:
    """A contender, the folder it reads, the report of each round, and why there is none where it could not take part."""

    contender: Contender
    folder: Path | None = None
    reason: str = ""
    reports: list[dict[str, Any]] = field(default_factory=list)

    @property
    def disk(self) -> int | None:
        """Bytes of the folder."""
        return None if self.folder is None else sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def median(self, what: str) -> float | None:
        """Return the median over all answers of all rounds; None for what is not told."""
        values = [cost[what] for report in self.reports for cost in report["costs"] if cost[what] is not None]
        return statistics.median(values) if values else None

    @property
    def peak_rss(self) -> float | None:
        """Median over the rounds of the process's peak memory, in bytes."""
        return statistics.median(report["peak_rss"] for report in self.reports) if self.reports else None

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON data."""
        medians = {name: self.median(name) for name in ("entered", *COLUMNS)}
        sizes = {"peak_rss": self.peak_rss, "disk": self.disk}
        return {"contender": asdict(self.contender), "reason": self.reason, "medians": medians, **sizes, "reports": self.reports}


def table(rows: list[Row]) -> str:
    """Return the table in Markdown; whoever could not take part has a line with the reason."""
    lines = [HEAD, "|---" * HEAD.count(" |") + "|"]
    lines += [_line(row) for row in rows]
    versions = {name: version for row in rows for report in row.reports for name, version in report["versions"].items()}
    return "\n".join(lines) + "\n\n" + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) + "\n"


def _line(row: Row) -> str:
    contender = row.contender
    cells = [f"{contender.peer} {contender.variant}".strip(), contender.precision, contender.kept]
    if row.reports:
        cells.append(_number(row.median("entered"), ".0f"))
        cells += [_number(row.median(name), form) for name, form in COLUMNS.items()]
        cells += [_number(None if size is None else size / 1e9, ".2f") for size in (row.peak_rss, row.disk)]
        if row.reason:
            cells[0] += f" (later rounds: {row.reason})"
    else:
        cells.append(f"not measured: {row.reason.replace('|', '/')}" if row.reason else "not measured")
        cells += [""] * 7
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
