"""Compiled chat templates: Jinja in a sandbox, in the dialect of transformers. Apart, as jinja2 takes 40 ms to import."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgeprune.errors import BundleError, UsageError


class _Generation(Extension):
    # Templates mark with it what training counts as an answer; for a prompt it means nothing.
    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str) -> Template:
    """Return a template with blocks trimmed and a few helpers; raise BundleError when it is broken."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise BundleError(f"The chat template is broken: {error}.", hint="Export the bundle again.") from error


def render_template(template: Template, **values: Any) -> str:
    """Return what a template says of some values; raise UsageError when it refuses them, BundleError when it fails."""
    try:
        return template.render(**values)
    except TemplateError as error:
        raise BundleError(f"The chat template failed: {error}.", hint="Export the bundle again.") from error


def _refuse(message: str) -> NoReturn:
    raise UsageError(f"The chat template refuses these messages: {message}.")


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own tojson escapes HTML characters, which templates for models do not want.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
