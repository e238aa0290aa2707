"""The command group, which turns an EdgePruneError into an error line and an exit code."""

from __future__ import annotations

from typing import Any

import click

from edgeprune import __version__
from edgeprune.cli.commands.ask import run
from edgeprune.cli.commands.calibrate import calibrate, merge, profile, report
from edgeprune.cli.commands.engines import build, check, selftest
from edgeprune.cli.commands.evaluate import compare, eval_command
from edgeprune.cli.commands.export import export, keygen, sign, verify
from edgeprune.cli.commands.inspect import completion, inspect, methods, models, tabletop
from edgeprune.cli.commands.measure import bench, doctor, estimate
from edgeprune.cli.commands.serve import ros2, serve
from edgeprune.errors import EdgePruneError, did_you_mean


class _ErrorReportingGroup(click.Group):
    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, _dashed(name)) is None:
            raise click.UsageError(f"No such command {name!r}. {did_you_mean(name, self.commands)}".rstrip(), ctx)
        return super().resolve_command(ctx, args)

    # An EdgePruneError is a message to the user. Any other exception is a bug and keeps its traceback.
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgePruneError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)


def _dashed(token: str) -> str:
    # Accept --image_size for --image-size.
    return token.replace("_", "-")


@click.group(
    cls=_ErrorReportingGroup,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": _dashed, "max_content_width": 100},
)
@click.version_option(__version__, message="edgeprune %(version)s")
def main() -> None:
    """Prune visual tokens of vision-language models, export to ONNX, run without torch."""


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
    compare,
    report,
    tabletop,
    inspect,
    models,
    methods,
    bench,
    doctor,
    completion,
    ros2,
    serve,
):
    main.add_command(_command)
