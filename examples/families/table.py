"""Write the table of what applies to which family into docs/families.md, from the code.

python examples/families/table.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgeprune.plan import SITES
from edgeprune.registry import FAMILIES, METHODS, applicability, family_class, method_class

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- made by examples/families/table.py -->\n", "<!-- end -->\n"


def table() -> str:
    """Return the table in Markdown: a row for each method, a column for each family, and the reasons below."""
    names = sorted(FAMILIES)
    lines = [f"| method | sites | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    reasons: list[str] = []
    for method in sorted(METHODS):
        sites = [site for site in SITES if site in method_class(method).sites]
        cells = [_cell(name, method, reasons) for name in names]
        lines.append(f"| {method} | {', '.join(sites)} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    return "\n".join(lines) + "\n"


def _cell(name: str, method: str, reasons: list[str]) -> str:
    # "yes", or the number of the reason why it acts at none of its sites.
    own = [
        field for field in applicability(family_class(name)) if field.method == method and field.site in method_class(method).sites
    ]
    if any(not field.reason for field in own):
        return "yes"
    reason = own[0].reason
    if reason not in reasons:
        reasons.append(reason)
    return f"no ({reasons.index(reason) + 1})"


def main() -> None:
    """Write the table, or say whether it is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Only say whether the page is up to date; exit 1 where it is not.")
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    whole = before + BEGIN + table() + END + after
    if parser.parse_args().check:
        sys.exit(0 if whole == page else f"{PAGE.name} is out of date: run this without --check")
    PAGE.write_text(whole, encoding="utf-8")


if __name__ == "__main__":
    main()
