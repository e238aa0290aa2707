"""The command that draws a page: report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli.options import fit_option, json_option
from edgeprune.errors import require_extra


@click.command()
@click.argument("target", metavar="PLAN|BUNDLE", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The HTML page to write.")
@click.option("--statistics", type=click.Path(path_type=Path), help="What `edgeprune calibrate` collected for this model.")
@click.option("--curve", type=click.Path(path_type=Path), help="What `edgeprune calibrate --method auto --curve` measured.")
@click.option("--image", type=click.Path(path_type=Path), help="An image to ask BUNDLE about.")
@click.option("--prompt", "prompts", multiple=True, help="The question; repeat it once to compare two.")
@click.option("--max-tokens", type=int, default=128, show_default=True, help="Longest answer, in tokens.")
@fit_option
@json_option
def report(output: Path, as_json: bool, **request: Any) -> None:
    """Draw PLAN, a JSON file, or BUNDLE, a folder, as one HTML page that needs no network.

    Budgets per layer and head, what calibration saw, the search's curve, and a bundle's answers with the patches that they saw.
    """
    require_extra("plot", "matplotlib")
    from edgeprune.cli.show import show_facts
    from edgeprune.report.gather import Request
    from edgeprune.report.page import write_report

    sections = write_report(Request(**request), output)
    show_facts({"report": str(output), "sections": ", ".join(sections)}, as_json)
