"""Sphinx builds the documentation from these pages, the examples' READMEs and the code: `make docs`.

Pages are Markdown, to be read in the repository too. Before Sphinx reads one, `<!-- page: PATH -->` is replaced by that file,
`<!-- methods -->` by the docstrings and options of all methods, and links out of this folder lead to the repository.
"""

from __future__ import annotations

import ast
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from edgeprune import __version__  # noqa: E402
from edgeprune.registry import METHODS, options_of, sites_of  # noqa: E402

REPOSITORY = "https://github.com/edgeprune/edgeprune"

project, author, version = "EdgePrune", "The EdgePrune authors", __version__
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click", "sphinx_copybutton"]
myst_heading_anchors = 3
html_theme, html_title = "furo", f"EdgePrune {version}"
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}
html_static_path, html_css_files = ["static"], ["site.css"]
exclude_patterns = ["build"]
smartquotes_action = "qe"  # no dashes: options begin with two hyphens
default_role = "literal"  # docstrings write code as `name`
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_type_aliases = {"ImageOrImages": "ImageOrImages", "Prompt": "Prompt"}
suppress_warnings = ["myst.header"]  # an included page begins with its own heading


def setup(app: Any) -> None:
    """Register what is done to a page."""
    app.connect("source-read", _prepare)


def _prepare(app: Any, name: str, source: list[str]) -> None:
    del app
    page, text = DOCS / f"{name}.md", source[0]
    included = re.search(r"<!-- page: (\S+) -->", text)
    if included:
        page = ROOT / included[1]
        text = page.read_text(encoding="utf-8")
    text = text.replace("<!-- methods -->", _methods())
    source[0] = re.sub(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)", lambda link: _link(link, page, DOCS / f"{name}.md"), text)


def _link(link: re.Match[str], page: Path, shown: Path) -> str:
    # `page`: the file in which the link is written; `shown`: the page of the documentation on which it stands.
    target, anchor = (page.parent / link[1]).resolve(), link[2] or ""
    if target.is_relative_to(DOCS):
        up = "../" * len(shown.parent.relative_to(DOCS).parts)
        return f"]({up}{target.relative_to(DOCS)}{anchor})"
    kind = "tree" if target.is_dir() else "blob"
    return f"]({REPOSITORY}/{kind}/main/{target.relative_to(ROOT)}{anchor})"


def _methods() -> str:
    # The modules need torch, so that they are parsed instead of imported.
    sections = []
    for name, reference in sorted(METHODS.items()):
        spec = find_spec(reference.partition(":")[0])
        assert spec is not None and spec.origin is not None
        docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
        papers = re.sub(r"arXiv\s(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", docstring)
        sections.append(f"## `{name}`\n\nActs at: {', '.join(sites_of(name))}.\n\n{papers}\n\n{_options(name)}\n")
    return "\n".join(sections)


def _options(method: str) -> str:
    ranking = options_of(method)
    rows = [
        f"| `{each.name}` | {each.shown_default} | {'the authors' if each.published else 'us'} | {each.allowed} | {each.meaning}"
        f"{'' if each in ranking else ' (in `edgeprune calibrate`)'} |"
        for each in options_of(method, calibration=True)
    ]
    return "\n".join(["| option | default | by | allowed | meaning |", "|---|---|---|---|---|", *rows]) if rows else ""
