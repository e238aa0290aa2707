"""Nothing that is read from a file can run code: no pickle, no eval."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Each with the reason why what it is given is no file of somebody else's.
ALLOWED: dict[tuple[str, str], str] = {}


def _findings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (f"import {each.name}" for each in node.names if each.name.partition(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FORBIDDEN_MODULES:
            yield f"import {node.module}"
        elif isinstance(node, ast.Call):
            yield from _call(node)


def _call(node: ast.Call) -> Iterator[str]:
    name, given = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
    if name in ("eval", "exec", "compile"):
        yield name
    if name in ("torch.load", "torch.jit.load", "torch.package.PackageImporter") and given.get("weights_only") != "True":
        yield name
    if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        yield name
    if name.endswith((".load", ".loadtxt")) and given.get("allow_pickle", "False") != "False":
        yield "allow_pickle"


def test_nothing_that_could_run_code_is_read() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), finding)
        for folder in ("edgeprune", "runtime", "export", "calibration", "examples")
        for path in (ROOT / folder).rglob("*.py")
        for finding in _findings(path)
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "eval(x)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "yaml.load(t)",
        "np.load(p, allow_pickle=True)",
    ],
)
def test_the_scan_sees(line: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(line)
    assert list(_findings(tmp_path / "x.py"))


@pytest.mark.parametrize("line", ["model.eval()", "torch.load(p, weights_only=True)", "yaml.safe_load(t)", "np.load(p)"])
def test_the_scan_leaves_alone(line: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(line)
    assert not list(_findings(tmp_path / "x.py"))
