"""The documentation is built without a warning, and every command that a page shows exists with its options."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from repository import ROOT

from edgeprune import runtime
from edgeprune.cli import main

PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"))
    if "edgeprune " in path.read_text()
)


def shown(page: str) -> list[list[str]]:
    """Return the words of the commands in a page's indented blocks and in its fences."""
    lines = re.findall(r"^(?: {4}|\$ )(edgeprune .+)$", (ROOT / page).read_text(), flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines if not re.search(r"[<>{|]|\.\.\.", line)]


def named(word: str) -> str:
    return word.partition("=")[0]


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist_with_their_options(page: str) -> None:
    context = click.Context(main)
    for _, name, *words in shown(page):
        command = main.get_command(context, name)
        assert command is not None, name
        options = {
            option
            for parameter in command.params
            if not str(parameter.name).startswith("former_")  # refused with its new name
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        unknown = {named(word) for word in words if word.startswith("-")} - options - {"--help"}
        assert not unknown, (name, unknown)


def test_commands_are_found() -> None:
    assert sum(len(shown(page)) for page in PAGES) > 60
    assert ["edgeprune", "inspect", "table.bundle"] in shown("docs/tutorials/first-bundle.md")


def members() -> list[str]:
    """Return the public names of the runtime, and what each class defines for others."""
    names = []
    for name in runtime.__all__:
        held = vars(value) if inspect.isclass(value := getattr(runtime, name)) else {}
        made = [key for key, part in held.items() if inspect.isfunction(part) or isinstance(part, property | classmethod)]
        names += [name, *(f"{name}.{key}" for key in made if not key.startswith("_"))]
    return [f"edgeprune.runtime.{name}" for name in names if name != "AnswerOptions"]  # shown by its fields


def test_help_says_what_each_parameter_is() -> None:
    for function in (runtime.load, runtime.Runtime.generate):
        said = inspect.getdoc(function) or ""
        for name, parameter in inspect.signature(function).parameters.items():
            assert name == "self" or parameter.kind is parameter.VAR_KEYWORD or f"`{name}`" in said, (function, name)
        assert "Raises" in said
    for kind in (runtime.Sampling, runtime.RequestLimits):
        assert all(f"`{field}`" in (kind.__doc__ or "") for field in kind.__dataclass_fields__), kind


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--builder", "html", "docs", str(tmp_path)]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pages = {
        name: (tmp_path / name).read_text() for name in ("reference/cli.html", "reference/runtime.html", "reference/methods.html")
    }
    assert "--image-size" in pages["reference/cli.html"]
    assert not re.search("\u2013(method|compare|image)", pages["reference/cli.html"])  # an option is no dash
    unlinked = re.findall(r"[^>]arXiv\s\d{4}", pages["reference/methods.html"])
    assert not unlinked
    assert "_static/site.css" in pages["reference/cli.html"] and (tmp_path / "_static" / "site.css").is_file()
    missing = [name for name in members() if f'id="{name}"' not in pages["reference/runtime.html"]]
    assert not missing
    assert "https://arxiv.org/abs/2502.14504" in pages["reference/methods.html"]
    assert (tmp_path / "searchindex.js").is_file()
