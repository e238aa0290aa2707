"""How `--help` looks: options by subject, each with its default; and what a shell completes."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

import click
from click.shell_completion import CompletionItem

from edgeprune.errors import EdgePruneError
from edgeprune.registry import METHODS, options_of

# Of the options that several subjects share a page with. Options that are not here stand first, under "Options".
_SECTIONS = {
    "Model": "revision adapter trust_remote_code own_method model against",
    "Samples": "data data_format image_folder split limit skip_bad metric calibrate_on statistics shard ray_address",
    "Plan": "plan_file plans method methods keep budget layer site option seed tier onto",
    "Ranking of caches": "rows reduce spread",
    "Search": "max_drop target_flops target_kv target_ttft target_reads times curve",
    "Images": "image_size frames fps fit image max_images max_pixels max_request_pixels",
    "Answer": "max_tokens temperature top_k top_p repetition_penalty keep_special_tokens stop deadline_ms tokens text_tokens",
    "Engines": "context turn images unpruned level workspace reuse ignore_memory sign",
    "Access": "host port api_key_file no_auth forwarded_allow_ips allow_origin",
    "Limits": "parallel queue per_client max_connections max_body_bytes max_kv_bytes cache_bytes grace",
    "Running": "provider device threads check require_signature trust energy",
    "Output": "output predictions overlay plot force as_json _click_default_help",
}
_SECTION_OF = {name: section for section, names in _SECTIONS.items() for name in names.split()}
_FEWEST = 8  # options that a page with sections has


class Command(click.Command):
    """A command whose help shows its options by subject, and whose errors are JSON if its output is."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; if something is missing, show the example of the help."""
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter as error:
            example = re.search(r"Example: (.+)", self.help or "")
            if example is None:
                raise
            raise click.UsageError(f"{error.format_message()} For example: {example[1]}", ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. With --json, an EdgePruneError becomes one line of JSON on stderr."""
        try:
            return super().invoke(ctx)
        except EdgePruneError as error:
            if not ctx.params.get("as_json"):
                raise
            facts = {"error": type(error).__name__, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}
            click.echo(json.dumps(facts), err=True)
            ctx.exit(error.exit_code)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, in sections if there are many."""
        options = [parameter for parameter in self.get_params(ctx) if parameter.param_type_name == "option"]
        if len(options) < _FEWEST:
            super().format_options(ctx, formatter)
            return
        for section in ("Options", *_SECTIONS):
            chosen = [option for option in options if _SECTION_OF.get(str(option.name), "Options") == section]
            records = [record for option in chosen if (record := option.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)


command = partial(click.command, cls=Command)


class MethodName(click.ParamType):
    """The name of a method, or MODULE:CLASS of one's own; checked where it is used."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name."""
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the methods that begin so."""
        return [CompletionItem(name) for name in METHODS if name.startswith(incomplete)]


class OptionText(click.ParamType):
    """NAME=VALUE, an option of the method that --method names; checked where it is used."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text."""
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the method's options, or the choices of the option whose name is written."""
        method, equals = ctx.params.get("method"), "=" in incomplete
        declared = options_of(method, calibration=ctx.info_name == "calibrate") if method in METHODS else ()
        texts = [f"{option.name}={value}" for option in declared for value in (option.choices if equals else ("",))]
        return [CompletionItem(text) for text in texts if text.startswith(incomplete)]
