"""The command group, and the one place where errors become a line and an exit code."""

from __future__ import annotations

from typing import Any

import click

from edgeprune import __version__
from edgeprune.cli.asking import eval_command, run
from edgeprune.cli.benchmarking import bench
from edgeprune.cli.building import build, check, selftest
from edgeprune.cli.calibrating import calibrate, merge, profile
from edgeprune.cli.diagnosing import doctor
from edgeprune.cli.estimating import estimate
from edgeprune.cli.listing import inspect, methods, models, tabletop
from edgeprune.cli.making import export, verify
from edgeprune.cli.reporting import report
from edgeprune.cli.ros2 import ros2
from edgeprune.cli.serving import serve
from edgeprune.cli.signing import keygen, sign
from edgeprune.errors import EdgePruneError


class _Funnel(click.Group):
    # An EdgePruneError is an answer to the user; anything else is a bug and keeps its traceback.
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgePruneError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)


def _dashed(token: str) -> str:
    # --image_size is --image-size.
    return token.replace("_", "-")


@click.group(
    cls=_Funnel,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": _dashed, "max_content_width": 100},
)
@click.version_option(__version__, message="edgeprune %(version)s")
def main() -> None:
    """Export vision-language models with pruned visual tokens to ONNX, and run them without torch."""


for _command in (
    calibrate,
    merge,
    profile,
    estimate,
    export,
    verify,
    keygen,
    sign,
    check,
    build,
    selftest,
    run,
    eval_command,
    report,
    tabletop,
    inspect,
    models,
    methods,
    bench,
    doctor,
    ros2,
    serve,
):
    main.add_command(_command)
