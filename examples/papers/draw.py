"""Draw the table of docs/papers.md: what is right, over the share of the visual work that is kept.

    python examples/papers/draw.py docs/papers.md docs/pareto.png

The picture's description is the sha256 of the table's lines.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from edgeprune.report.comparison import draw


def table_of(text: str) -> str:
    """Return the lines of the table in a Markdown text that begins with the column "plan"."""
    return text[text.index("| plan |") :].partition("\n\n")[0].strip()


def read_table(table: str) -> tuple[list[str], dict[str, list[float | None]]]:
    """Return the names of the plans, and the shares of all plans by column."""
    head, _, *body = ([cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines())
    columns = {title: [_share(cells[number]) for cells in body] for number, title in enumerate(head) if number}
    return [cells[0] for cells in body], columns


def _share(cell: str) -> float | None:
    return float(cell.rstrip("%")) / 100 if cell.endswith("%") else None


def digest_of(table: str) -> str:
    """Return what says which table a picture shows."""
    return hashlib.sha256(table.encode()).hexdigest()


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="a Markdown file with the table")
    parser.add_argument("picture", type=Path)
    request = parser.parse_args()
    table = table_of(request.table.read_text(encoding="utf-8"))
    draw(*read_table(table), request.picture, digest_of(table))


if __name__ == "__main__":
    main()
