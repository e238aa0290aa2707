"""The wheel holds the whole package and nothing else, and the tree keeps its shape."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from repository import ROOT, tool

import edgeprune

LINKED = ("export", "runtime", "calibration")
NAMESPACE = "edgeprune/cli/namespace"  # goes into optimum's own namespace, where an __init__.py would break it
LONGEST_FILE = 500  # lines


def sources(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


@pytest.fixture(scope="module")
def sources_then(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the sources as they are now, whatever is edited meanwhile."""
    copy = tmp_path_factory.mktemp("source")
    for folder in ("edgeprune", *LINKED):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in tool("build_wheel").FILES:
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(sources_then: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tool("build_wheel").build(tmp_path_factory.mktemp("wheel"), sources_then))


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_another_build_has_the_same_bytes(wheel: Path, sources_then: Path, tmp_path: Path) -> None:
    source = tmp_path / "another place"
    shutil.copytree(sources_then, source)
    for path in source.rglob("*.py"):
        path.chmod(0o600)
        os.utime(path, (10**9, 10**9))
    (source / "build" / "lib" / "edgeprune").mkdir(parents=True)
    (source / "build" / "lib" / "edgeprune" / "deleted.py").touch()  # of an older build
    # Another process, of other rights and another seed of hashes.
    command = [sys.executable, str(ROOT / "tools" / "build_wheel.py"), str(tmp_path / "out"), "--source", str(source)]
    subprocess.run(command, check=True, capture_output=True, umask=0o077, env=os.environ | {"TZ": "Asia/Tokyo"})
    assert next((tmp_path / "out").glob("*.whl")).read_bytes() == wheel.read_bytes()


def test_the_date_of_a_wheel_is_that_of_the_commit_unless_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source_date = tool("build_wheel").source_date
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert source_date(tmp_path) == "315532800"
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    dated = os.environ | {"GIT_COMMITTER_DATE": "1700000000 +0000"}
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "first"], check=True, env=dated)
    assert source_date(tmp_path) == "1700000000"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1800000000")
    assert source_date(tmp_path) == "1800000000"


def test_the_wheel_holds_every_module_and_nothing_else(wheel_names: set[str]) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in sources("edgeprune") if not path.is_relative_to(ROOT / NAMESPACE)}
    expected |= {f"edgeprune/{path.relative_to(ROOT).as_posix()}" for folder in LINKED for path in sources(folder)}
    expected |= {path.relative_to(ROOT / NAMESPACE).as_posix() for path in sources(NAMESPACE)}
    assert {name for name in wheel_names if name.endswith(".py")} == expected
    data = {name for name in wheel_names - expected if not name.startswith("edgeprune/tabletop/model/")}
    web = {
        f"edgeprune/runtime/server/web/{name}"
        for name in ("index.html", "style.css", "icon.svg", "page.js", "server.js", "picture.js", "answers.js")
    }
    assert data == {"edgeprune/py.typed", "edgeprune/report/page.html.jinja", *web}


def test_the_wheel_holds_the_model(wheel_names: set[str]) -> None:
    model = {path.name for path in (ROOT / "edgeprune" / "tabletop" / "model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"} <= model
    assert {name.rpartition("/")[2] for name in wheel_names if "tabletop/model/" in name} == model


def test_the_model_stays_small() -> None:
    size = sum(path.stat().st_size for path in (ROOT / "edgeprune" / "tabletop" / "model").iterdir())
    assert size <= 16 * 1024 * 1024


@pytest.mark.parametrize("folder", ["edgeprune", *LINKED, "tests", "examples"])
def test_files_stay_small_and_have_a_subject(folder: str) -> None:
    for path in sources(folder):
        assert len(path.read_text().splitlines()) <= LONGEST_FILE, path
        assert path.stem not in {"utils", "helpers", "common", "misc"}, path


def test_every_package_folder_is_a_package() -> None:
    for folder in ("edgeprune", *LINKED):
        for parent in {path.parent for path in sources(folder)}:
            assert (parent / "__init__.py").is_file() != parent.is_relative_to(ROOT / NAMESPACE), parent


def test_the_two_versions_agree() -> None:
    assert version("edgeprune") == edgeprune.__version__
