"""The package is one and the same from a bare checkout, from pip in the checkout, by way of an sdist, and as a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from repository import ROOT, tool

import edgeprune

LINKED = ("export", "runtime", "calibration")
HERE = "import sys; sys.path.insert(0, '.'); "
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
OURS = {"INSTALLER", "RECORD", "REQUESTED", "direct_url.json"}  # what pip notes of an installation
DATE = "1700000000"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the files that git would commit now, links as links. Nothing may write into it."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("these sources are no checkout")
    folder = tmp_path_factory.mktemp("checkout")
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture
def own_checkout(checkout: Path, tmp_path: Path) -> Path:
    """Return a copy of the checkout that a build may write into."""
    return Path(shutil.copytree(checkout, tmp_path / "checkout", symlinks=True))


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", DATE)
        return Path(tool("build_wheel").build(tmp_path_factory.mktemp("wheel"), checkout))


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python in a folder, without what PYTHONPATH says of other ones."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-B", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=inherited | environment)


def test_a_bare_checkout_can_be_imported(checkout: Path) -> None:
    show = "import edgeprune.runtime; print(edgeprune.runtime.__file__, edgeprune.runtime.load.__module__)"
    expected = [str(checkout / "edgeprune" / "runtime" / "__init__.py"), "edgeprune.runtime.api.loading"]
    assert python(checkout, "-I", "-c", f"import sys; sys.path.insert(0, {str(checkout)!r}); {show}").stdout.split() == expected
    assert python(checkout.parent, "-c", show, PYTHONPATH=str(checkout)).stdout.split() == expected


def test_a_bare_checkout_has_the_command_line(checkout: Path) -> None:
    result = python(checkout, "-v", "-m", "edgeprune", "--version")
    assert result.stdout == f"edgeprune {edgeprune.__version__}\n"
    assert str(checkout / "edgeprune" / "cli" / "app.py") in result.stderr  # and not that of an installed package


@pytest.mark.parametrize("before", ["", "import edgeprune; "])
@pytest.mark.parametrize("folder", LINKED)
def test_a_folder_at_the_root_is_no_package_of_its_own(folder: str, before: str, checkout: Path) -> None:
    result = python(checkout, "-I", "-c", f"{HERE}{before}import {folder}")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"ImportError: Import edgeprune.{folder}: {folder}/ is a folder of")


def test_links_that_are_text_files_are_explained_and_the_remedy_works(checkout: Path, tmp_path: Path) -> None:
    source, clone = tmp_path / "source", tmp_path / "clone"
    for folder in ("edgeprune", *LINKED):
        shutil.copytree(checkout / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("*.safetensors"))
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(source)]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    # As on a system without links.
    subprocess.run(["git", "clone", "--quiet", "-c", "core.symlinks=false", str(source), str(clone)], check=True)
    assert (clone / "edgeprune" / "runtime").read_text() == "../runtime"

    result = python(clone, "-I", "-c", f"{HERE}import edgeprune")
    assert result.returncode == 1
    said, _, remedy = result.stderr.splitlines()[-1].partition("Run: ")
    assert said.startswith("ImportError: ") and "text files here, not symbolic links" in said
    assert all(f"edgeprune/{folder}" in said for folder in LINKED)

    subprocess.run(remedy, shell=True, check=True, cwd=clone)
    assert python(clone, "-I", "-c", f"{HERE}import edgeprune.runtime").returncode == 0
    assert subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True).stdout == ""


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}


def test_pip_in_a_checkout_installs_what_the_wheel_holds(own_checkout: Path, wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--target", str(target)]
    subprocess.run([*PIP, "install", *options, "."], cwd=own_checkout, check=True)
    files = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if path.is_file()}
    assert files.pop("bin/edgeprune")
    installed = {name: path.read_bytes() for name, path in files.items() if ".dist-info/" not in name or path.name not in OURS}
    assert installed == contents(wheel)


@pytest.mark.slow
def test_a_wheel_by_way_of_an_sdist_has_the_same_bytes(own_checkout: Path, wheel: Path, tmp_path: Path) -> None:
    environment = os.environ | {"SOURCE_DATE_EPOCH": DATE, "PYTHONHASHSEED": "0"}
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    subprocess.run(command, cwd=own_checkout, check=True, capture_output=True, env=environment, umask=0o022)
    sdist = tmp_path / f"edgeprune-{edgeprune.__version__}.tar.gz"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path / "out")]
    subprocess.run([*PIP, "wheel", *options, str(sdist)], check=True, env=environment, umask=0o022)
    assert contents(tmp_path / "out" / wheel.name) == contents(wheel)
    assert (tmp_path / "out" / wheel.name).read_bytes() == wheel.read_bytes()


def test_the_wheel_holds_the_licence_and_names_it(checkout: Path, wheel: Path) -> None:
    held = contents(wheel)
    information = f"edgeprune-{edgeprune.__version__}.dist-info"
    assert held[f"{information}/licenses/LICENSE"] == (checkout / "LICENSE").read_bytes()
    metadata = held[f"{information}/METADATA"].decode().splitlines()
    assert {"License-Expression: Apache-2.0", "License-File: LICENSE"} <= set(metadata)
    assert not any(line.startswith("Classifier: License ::") for line in metadata)  # PEP 639: never beside an expression
