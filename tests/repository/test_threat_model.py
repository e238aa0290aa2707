"""Every line of the threat model's checks names a test that exists."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from repository import TESTS

PAGE = (TESTS.parent / "docs" / "threat-model.md").read_text(encoding="utf-8")
CHECKS = [row for row in PAGE.partition("## What each check stops")[2].splitlines() if row.startswith("| ")][1:]


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse(next(TESTS.rglob(file)).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_there_are_checks() -> None:
    assert len(CHECKS) > 20


@pytest.mark.parametrize("row", CHECKS, ids=lambda row: row.split("|")[1].strip())
def test_each_check_names_its_tests(row: str) -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
    assert named
    for file, test in named:
        assert test in names_in(file), f"{file}::{test}"


def test_each_check_has_three_columns() -> None:
    assert all(row.count("|") == 4 for row in CHECKS)
