"""Chat templates: sandboxed Jinja in the dialect of transformers. A separate module because jinja2 takes 40 ms to import."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgeprune.errors import BundleError, EdgePruneError, UsageError


class _Generation(Extension):
    # {% generation %} marks the tokens that count as the answer in training. It does not affect a prompt.
    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str) -> Template:
    """Compile a template with trimmed blocks and the helpers of transformers; raise BundleError if it is invalid."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise BundleError(f"The chat template is broken: {error}.", hint="Export the bundle again.") from error


def render_template(template: Template, **values: Any) -> str:
    """Render a template; raise UsageError when it rejects the values, BundleError when it fails."""
    try:
        return template.render(**values)
    except EdgePruneError:
        raise
    except Exception as error:  # a template is code of its own: it may add a list to a text, or recurse
        cause = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise BundleError(f"The chat template failed: {cause}.", hint="Check the template of the checkpoint.") from error


def _raise_exception(message: str) -> NoReturn:
    raise UsageError(f"The chat template refuses these messages: {message}.")


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own tojson escapes HTML characters, which model prompts must not contain.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
