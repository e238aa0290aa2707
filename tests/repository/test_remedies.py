"""Every command that a message, a help text or a remedy shows is one: it exists, and its options and values parse.

The messages are collected from the sources, so that a new one is checked without being listed here.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from repository import ROOT

from edgeprune.cli import main

# After a colon a command is to be typed, with all that it needs. Elsewhere a sentence names it.
TYPED = re.compile(r"(?::|-> |\bExample:) edgeprune ([a-z0-9]+[^,;`\n]*)")
NAMED = re.compile(r"`edgeprune ([a-z0-9]+)")
VALUES = {
    "method": "plphp",
    "target": "jetpack6",
    "precision": "fp16",
}  # of options that take certain words only, by what is filled in
SOURCES = [path for folder in ("edgeprune", "runtime", "export", "calibration") for path in sorted((ROOT / folder).rglob("*.py"))]


def written(node: ast.AST) -> str:
    """Return the text of a string, with a word for each value that is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(written(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return next((value for name, value in VALUES.items() if name in ast.unparse(node.value)), "VALUE")
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def texts(path: Path) -> Iterator[str]:
    """Yield the strings of a file; a string with values counts once, as a whole."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in parts and "edgeprune " in written(node):
            yield written(node)


SHOWN = sorted({(str(path.relative_to(ROOT)), text) for path in SOURCES for text in texts(path)})


def remedies() -> list[str]:
    return sorted({found.rstrip(".") for _, text in SHOWN for found in TYPED.findall(text)})


def parses(command: str) -> None:
    name, *arguments = shlex.split(command.partition(" >> ")[0].replace(" N", " 4"))
    main.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("command", remedies())
def test_a_command_to_be_typed_parses(command: str) -> None:
    parses(command)


def test_a_command_that_lacks_something_does_not_parse() -> None:
    for command in ("build", "calibrate --method auto --curve FILE", "export tabletop -o b --keep-ratio 0.5"):
        with pytest.raises(click.UsageError):
            parses(command)
    assert len(remedies()) > 25


def test_commands_that_sentences_name_exist() -> None:
    unknown = {(path, name) for path, text in SHOWN for name in NAMED.findall(text) if name not in main.commands}
    assert not unknown
