"""Commands about this machine: doctor, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli.options import bundle_argument, fit_option, json_option, provider_option


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what can be done on this machine, what stands in the way, and the command that removes it."""
    from edgeprune.cli.measured import show_diagnosis
    from edgeprune.device.doctor import diagnose
    from edgeprune.device.machine import read_machine

    diagnosis = diagnose(read_machine())
    show_diagnosis(diagnosis, as_json)
    ctx.exit(0 if diagnosis.can_run else 1)


@click.command()
@bundle_argument
@click.option("--image", type=click.Path(path_type=Path), help="The image to ask about.  [default: a TableTop scene]")
@click.option("--prompt", help="The question.  [default: what is on the table]")
@click.option("--tokens", default=32, show_default=True, help="Tokens of every answer; end tokens do not end it.")
@click.option("--repeats", default=10, show_default=True, help="How often both modes are measured, in turns.")
@click.option("--threads", type=int, help="ONNX Runtime threads.  [default: all cores]")
@provider_option
@fit_option
@json_option
def bench(bundle: Path, repeats: int, as_json: bool, **options: Any) -> None:
    """Measure what a question costs with BUNDLE on this machine, pruned beside unpruned: times, memory, energy."""
    from edgeprune.cli.measured import show_benchmark
    from edgeprune.cli.show import Counter
    from edgeprune.runtime.benchmark import benchmark

    with Counter("rounds", repeats, quiet=as_json) as counter:
        result = benchmark(bundle, repeats=repeats, progress=counter.update, **options)
    show_benchmark(result, as_json)
