"""`optimum-cli export edgeprune`: `edgeprune export` with model and output arguments in the form of optimum's exporters.

optimum uses argparse. The options are declared there from the Click command, which parses and validates them.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping
from typing import Any

import click
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from edgeprune.cli.app import main
from edgeprune.cli.commands.export import export
from edgeprune.registry import TASK


class ExportEdgePrune(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum is untyped
    """The subcommand of `optimum-cli export`."""

    COMMAND = CommandInfo(
        name="edgeprune", help="Export a vision-language model with pruned visual tokens as a bundle of ONNX graphs."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the arguments."""
        parser.description = export.get_short_help_str(limit=200)
        parser.add_argument("-m", "--model", required=True, help="A transformers folder, an id of the hub, or tabletop.")
        parser.add_argument("--task", choices=("auto", TASK), default="auto", help="The task; all families have the same.")
        parser.add_argument("output", nargs="?", help="The bundle folder to write.")
        parser.add_argument("-o", "--output", dest="output_option", metavar="OUTPUT", help="The same, as an option.")
        for option in shared_options():
            parser.add_argument(*option.opts, dest=option.name, **_argparse_keywords(option))

    def run(self) -> None:
        """Run `edgeprune export` and exit with its exit code."""
        given = vars(self.args)
        outputs = [name for name in (given["output"], given["output_option"]) if name is not None]
        if len(outputs) != 1:
            self.parser.error("give one output")
        main(["export", *command_line(given), f"--output={outputs[0]}", "--", given["model"]], prog_name="edgeprune")


def shared_options() -> list[click.Option]:
    """Return the options of `edgeprune export` except the output, which optimum takes as an argument."""
    return [option for option in export.params if isinstance(option, click.Option) and option.name != "output"]


def command_line(given: Mapping[str, Any]) -> list[str]:
    """Return the options as command-line arguments."""
    arguments = []
    for option in shared_options():
        value, name = given[option.name], option.opts[-1]
        if option.is_flag:
            arguments += [name] if value else []
        else:
            values = value if isinstance(value, list) else [] if value is None else [value]
            arguments += [f"{name}={item}" for item in values]
    return arguments


def _argparse_keywords(option: click.Option) -> dict[str, Any]:
    # Without types and defaults: Click handles both.
    help_text = f"{option.help or ''}  [default: {option.default}]" if option.show_default else option.help or ""
    keywords = {"help": help_text.replace("%", "%%"), "default": None}
    if option.is_flag:
        return keywords | {"action": "store_true"}
    choices = list(option.type.choices) if isinstance(option.type, click.Choice) else None
    return keywords | {
        "action": "append" if option.multiple else "store",
        "choices": choices,
        "metavar": None if choices else "VALUE",
    }
