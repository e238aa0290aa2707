"""Commands that look and list: tabletop, inspect, models, methods."""

from __future__ import annotations

from pathlib import Path

import click

from edgeprune.cli.options import bundle_argument, json_option


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--scenes", default=100, show_default=True, help="How many scenes to draw.")
@click.option("--seed", default=0, show_default=True, help="The same seed draws the same scenes.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@json_option
def tabletop(out: Path, scenes: int, seed: int, force: bool, as_json: bool) -> None:
    """Draw TableTop scenes into the folder OUT: images and dataset.jsonl with image, prompt, answer, kind."""
    from edgeprune.cli.show import Counter, show_facts
    from edgeprune.tabletop.dataset import write_dataset

    with Counter("scenes", scenes, quiet=as_json) as counter:
        questions = write_dataset(out, scenes, seed, force=force, progress=counter.update)
    show_facts({"dataset": str(out / "dataset.jsonl"), "scenes": scenes, "questions": questions, "seed": seed}, as_json)


@click.command()
@bundle_argument
@json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what BUNDLE holds, after checking every file against its manifest."""
    from edgeprune.bundle import Bundle
    from edgeprune.cli.show import show_bundle

    show_bundle(Bundle.load(bundle), as_json)


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the model families that can be exported."""
    from edgeprune.cli.show import show_table
    from edgeprune.registry import FAMILIES, summary_of

    rows = [[name, summary_of(reference)] for name, reference in sorted(FAMILIES.items())]
    show_table(["model_type", "family"], rows, as_json)


@click.command()
@json_option
def methods(as_json: bool) -> None:
    """List the pruning methods."""
    from edgeprune.cli.show import show_table
    from edgeprune.registry import METHODS, summary_of

    rows = [[name, summary_of(reference)] for name, reference in sorted(METHODS.items())]
    show_table(["method", "keeps"], rows, as_json)
