"""CITATION.cff names this version, and the paper of every method as the method's own docstring does."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import ROOT

import edgeprune
from edgeprune.registry import METHODS

CITATION: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
BASELINES = {"learned", "random", "uniform"}  # ours


def paper(method: str) -> tuple[str, str, str]:
    """Return first author, title and arXiv number of a method's paper, from the docstring of its file."""
    module = METHODS[method].partition(":")[0]
    source = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
    text = " ".join((ast.get_docstring(ast.parse(source)) or "").split())
    found = re.search(r'(\w+) et al\., "(.+?)",.*?arXiv (\d{4}\.\d{5})', text)
    assert found, method
    return found[1], found[2], found[3]


@pytest.mark.parametrize("method", sorted(METHODS.keys() - BASELINES))
def test_the_paper_of_a_method_can_be_cited(method: str) -> None:
    author, title, number = paper(method)
    cited = {each["identifiers"][0]["value"]: each for each in CITATION["references"]}
    reference = cited[f"arXiv:{number}"]
    assert reference["title"] == title
    assert reference["authors"][0]["family-names"] == author
    assert reference["url"].endswith(f"/{number}")


def test_nothing_else_is_cited() -> None:
    assert len(CITATION["references"]) == len(METHODS.keys() - BASELINES)


def test_the_version_and_the_licence_are_those_of_the_package() -> None:
    assert CITATION["version"] == edgeprune.__version__
    assert f'license = "{CITATION["license"]}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"## [{edgeprune.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
