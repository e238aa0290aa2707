"""Commands that measure or estimate: bench, estimate, doctor."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli.help import command
from edgeprune.cli.options import bundle_argument, fit_option, force_option, json_option, provider_option, threads_option
from edgeprune.errors import UsageError, require_extra
from edgeprune.io.files import check_output
from edgeprune.targets import PRECISIONS

if TYPE_CHECKING:
    from edgeprune.device.jetson import Module
    from edgeprune.device.roofline import Estimate, Interval, MemoryEstimate
    from edgeprune.device.workload import Workload

_PICTURES = (".png", ".svg", ".pdf")


@command()
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
@force_option
@click.option("--image", type=click.Path(path_type=Path), help="The image to ask about.  [default: a TableTop scene]")
@click.option("--prompt", help="The question.  [default: what is on the table]")
@click.option("--tokens", default=32, show_default=True, help="Tokens of every answer; end tokens do not end it.")
@click.option("--repeats", default=10, show_default=True, help="Rounds, in each of which all are measured in turns.")
@threads_option
@provider_option
@fit_option
@json_option
def bench(
    bundle: Path,
    compare: str,
    contexts: str,
    kept: str,
    plot: Path | None,
    force: bool,
    repeats: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what a question costs with BUNDLE on this machine.

    Times, memory, energy and share of the roofline, beside no pruning, other methods or other bundles.

    \b
    Example: edgeprune bench table.bundle --compare none,uniform
    """
    options["contexts"], options["kept"] = parse_counts(contexts, "--contexts 200,1000,2000"), parse_counts(kept, "--kept 256,1024")
    names = [name.strip() for name in compare.split(",") if name.strip()]
    if plot is not None:
        require_extra("plot", "matplotlib")
        check_output(plot, force=force, inputs=[bundle, options["device_report"], options["image"]])
        _check_picture(plot)
    from edgeprune.benchmark.run import benchmark
    from edgeprune.cli.output.basic import ProgressBar
    from edgeprune.cli.output.measure import show_benchmark

    with ProgressBar("rounds", repeats, quiet=as_json) as counter:
        result = benchmark(bundle, compare=names, repeats=repeats, progress=counter.update, **options)
    show_benchmark(result, as_json)
    if plot is not None:
        from edgeprune.benchmark.chart import draw

        draw(result, plot)


def parse_counts(text: str, example: str) -> list[int]:
    """Return [200, 1000] for "200,1000"; an empty list for an empty text."""
    try:
        counts = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"{text!r} are no numbers of tokens.", hint=f"Write them with commas: {example}") from error
    return counts


def _check_picture(plot: Path) -> None:
    if plot.suffix not in _PICTURES:
        raise UsageError(f"Cannot draw {plot}.", hint=f"Name a file as {', '.join(_PICTURES)}.")


@command()
@bundle_argument
@click.option("--device", required=True, help="A Jetson module, such as orin-nano, orin-nx, agx-orin or thor.")
@click.option("--text-tokens", default=32, show_default=True, help="Tokens of the question.")
@click.option("--tokens", default=64, show_default=True, help="Tokens of the answer.")
@click.option("--precision", type=click.Choice(PRECISIONS), help="Of the engines.  [default: the bundle's; fp16 for one of fp32]")
@json_option
def estimate(bundle: Path, device: str, text_tokens: int, tokens: int, precision: str | None, as_json: bool) -> None:
    """Estimate what an answer of BUNDLE costs on a Jetson.

    Times are ranges with what limits them; memory is at rest and at peak.

    A roofline of the module's peak numbers, not a measurement; `edgeprune profile` measures.
    """
    from edgeprune.bundle import Bundle
    from edgeprune.device import jetson as modules
    from edgeprune.device import roofline, workload

    module, opened = modules.module_named(device), Bundle.load(bundle)
    chosen = precision or _engine_precision(opened.manifest.precision)
    work = workload.workload_of(opened, text_tokens=text_tokens, generated=tokens, precision=chosen)
    pruned, unpruned = roofline.estimate(work, module), roofline.estimate(work.unpruned(), module)
    _show(work, module, opened.manifest.precision, pruned, unpruned, as_json)


def _engine_precision(precision: str) -> str:
    # Engines of float32 graphs are usually built with FP16 allowed; the output states this assumption.
    return "fp16" if precision == "fp32" else precision


def _show(work: Workload, module: Module, bundle_precision: str, pruned: Estimate, unpruned: Estimate, as_json: bool) -> None:
    from edgeprune.cli.output.basic import show_facts, show_json, show_table

    if as_json:
        request = {"device": module.name, "precision": work.precision.name, "bundle_precision": bundle_precision}
        tokens = {"visual_tokens": work.tower.tokens, "text_tokens": work.text_tokens, "tokens": work.generated}
        show_json({**request, **tokens, "pruned": _to_json(pruned), "unpruned": _to_json(unpruned)})
        return
    assumed = "" if work.precision.name == bundle_precision else f", assumed: the bundle is {bundle_precision}"
    facts = {
        "device": f"{module.title}: {module.tflops():.1f} TFLOPS dense FP16, {module.bandwidth:g} GB/s, {module.ram} GiB",
        "workload": f"{work.tower.tokens} visual tokens, {work.text_tokens} of the question, {work.generated} of the answer",
        "precision": f"{work.precision.name}{assumed}",
    }
    show_facts(facts, as_json=False)
    click.echo()
    show_table(["stage", "ms", "limit", "unpruned ms", "limit"], _time_rows(pruned, unpruned), as_json=False)
    click.echo()
    show_table(["memory", "MB", "unpruned MB"], _memory_rows(pruned.memory, unpruned.memory), as_json=False)
    click.echo(f"\nfits in {module.ram} GiB, the system's own not counted: {pruned.memory.fits}")
    click.echo("A roofline of peak numbers, not a measurement; how far off it was: docs/roofline.md")


def _time_rows(pruned: Estimate, unpruned: Estimate) -> list[list[str]]:
    rows = []
    for stage in pruned.stages:
        other = unpruned.stage(stage.name)
        unpruned_cells = ["-", ""] if other is None else [_span(other.ms), other.limit]
        rows.append(["decode, a token" if stage.name == "decode" else stage.name, _span(stage.ms), stage.limit, *unpruned_cells])
    rows.insert(-1, ["first token", _span(pruned.ttft_ms), "", _span(unpruned.ttft_ms), ""])
    return rows


def _memory_rows(pruned: MemoryEstimate, unpruned: MemoryEstimate) -> list[list[str]]:
    return [
        ["weights", *(f"{memory.weights / 1e6:.1f}" for memory in (pruned, unpruned))],
        ["runtime", *(_span(memory.runtime, 1e-6) for memory in (pruned, unpruned))],
        ["at rest", *(_span(memory.at_rest, 1e-6) for memory in (pruned, unpruned))],
        ["KV cache", *(f"{memory.kv / 1e6:.1f}" for memory in (pruned, unpruned))],
        ["activations", *(f"{memory.activations / 1e6:.1f}" for memory in (pruned, unpruned))],
        ["at peak", *(_span(memory.at_peak, 1e-6) for memory in (pruned, unpruned))],
        ["file cache, given back", *(f"{memory.file_cache / 1e6:.1f}" for memory in (pruned, unpruned))],
    ]


def _span(value: Interval, scale: float = 1.0) -> str:
    digits = 2 if value.high * scale < 1 else 1 if value.high * scale < 100 else 0
    return f"{value.low * scale:.{digits}f} to {value.high * scale:.{digits}f}"


def _to_json(result: Estimate) -> dict[str, Any]:
    memory = result.memory
    totals = {"at_rest": asdict(memory.at_rest), "at_peak": asdict(memory.at_peak), "fits": memory.fits}
    return {
        "stages": [asdict(stage) for stage in result.stages],
        "ttft_ms": asdict(result.ttft_ms),
        "token_ms": asdict(result.token_ms),
        "memory": {**asdict(memory), **totals},
    }


@command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what this machine can do, and what stands in the way.

    Each obstacle comes with the command that removes it.
    """
    from edgeprune.cli.output.measure import show_diagnosis
    from edgeprune.device.doctor import diagnose
    from edgeprune.device.machine import read_machine

    diagnosis = diagnose(read_machine())
    show_diagnosis(diagnosis, as_json)
    ctx.exit(0 if diagnosis.can_run else 1)
