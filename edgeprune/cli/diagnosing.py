"""The command about this machine: doctor."""

from __future__ import annotations

import click

from edgeprune.cli.options import json_option


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
