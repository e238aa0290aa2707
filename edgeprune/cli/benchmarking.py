"""The command that measures answers on this machine: bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli.options import bundle_argument, fit_option, json_option, provider_option
from edgeprune.errors import UsageError, require_extra

_PICTURES = (".png", ".svg", ".pdf")


@click.command()
@bundle_argument
@click.option(
    "--compare",
    default="none",
    show_default=True,
    help="What to put beside it, with commas: none (the same unpruned), random, uniform, paths of other bundles.",
)
@click.option("--contexts", default="", help="Text tokens in the cache at which ms per token is measured, such as 200,1000,2000.")
@click.option("--kept", default="", help="Visual tokens with which the first token is measured, such as 256,1024,4096.")
@click.option(
    "--device-report", type=click.Path(path_type=Path), help="Take the machine's peaks from what `edgeprune profile` wrote."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it: a .png, .svg or .pdf.")
@click.option("--image", type=click.Path(path_type=Path), help="The image to ask about.  [default: a TableTop scene]")
@click.option("--prompt", help="The question.  [default: what is on the table]")
@click.option("--tokens", default=32, show_default=True, help="Tokens of every answer; end tokens do not end it.")
@click.option("--repeats", default=10, show_default=True, help="Rounds, in each of which all are measured in turns.")
@click.option("--threads", type=int, help="ONNX Runtime threads.  [default: all cores]")
@provider_option
@fit_option
@json_option
def bench(
    bundle: Path, compare: str, contexts: str, kept: str, plot: Path | None, repeats: int, as_json: bool, **options: Any
) -> None:
    """Measure what a question costs with BUNDLE here, beside what it costs otherwise: times, memory, energy, roofline."""
    options["contexts"], options["kept"] = parse_counts(contexts, "--contexts 200,1000,2000"), parse_counts(kept, "--kept 256,1024")
    names = [name.strip() for name in compare.split(",") if name.strip()]
    _check_plot(plot)
    from edgeprune.benchmark.run import benchmark
    from edgeprune.cli.measured import show_benchmark
    from edgeprune.cli.show import Counter

    with Counter("rounds", repeats, quiet=as_json) as counter:
        result = benchmark(bundle, compare=names, repeats=repeats, progress=counter.update, **options)
    show_benchmark(result, as_json)
    if plot is not None:
        from edgeprune.benchmark.chart import draw

        draw(result, plot)


def parse_counts(text: str, example: str) -> list[int]:
    """Return [200, 1000] of "200,1000"; nothing of an empty text."""
    try:
        counts = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"{text!r} are no numbers of tokens.", hint=f"Write them with commas: {example}") from error
    return counts


def _check_plot(plot: Path | None) -> None:
    if plot is None:
        return
    require_extra("plot", "matplotlib")
    if plot.suffix not in _PICTURES or not plot.parent.is_dir():
        raise UsageError(f"Cannot draw {plot}.", hint=f"Name a file in a folder that is there, as {', '.join(_PICTURES)}.")
