"""The locks hold what pyproject.toml asks for and nothing else, by version and hash, and docs/licences.md has all of it."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distributions
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import ROOT, tool

LOCKS = ("runtime", "export", "test", "release", "fuzz", "uv")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def lines_of(lock: str) -> list[str]:
    """Return the entries of a lock, each with its hashes on one line."""
    text = (ROOT / "locks" / f"{lock}.txt").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


@cache
def locked(lock: str, python: str, machine: str = "x86_64") -> dict[str, str]:
    """Return the versions by name that a lock gives to a Python on Linux."""
    there = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "platform_machine": machine}
    entries = [Requirement(line.partition("--hash")[0].strip()) for line in lines_of(lock)]
    here = [each for each in entries if each.marker is None or each.marker.evaluate({**there, "extra": ""})]
    assert len({each.name for each in here}) == len(here)  # never two versions for one machine
    return {canonicalize_name(each.name): next(iter(each.specifier)).version for each in here}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    data: dict[str, Any] = toml.loads((ROOT / "pyproject.toml").read_text())
    return data


@pytest.fixture(scope="module")
def licences() -> ModuleType:
    return tool("licences")


def asked(project: dict[str, Any], lock: str) -> list[str]:
    """Return the requirements that a lock was solved for."""
    extras = project["project"]["optional-dependencies"]
    if lock in project["dependency-groups"]:
        return list(project["dependency-groups"][lock])
    chosen = {"runtime": [], "export": ["export"], "test": list(extras)}[lock]
    return [*project["project"]["dependencies"], *(each for extra in chosen for each in extras[extra])]


def applying(requirements: list[str], python: str) -> Iterator[Requirement]:
    there = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "platform_machine": "x86_64"}
    for requirement in map(Requirement, requirements):
        if requirement.name != "torch" and (requirement.marker is None or requirement.marker.evaluate({**there, "extra": ""})):
            yield requirement


@pytest.mark.parametrize("lock", LOCKS)
def test_every_entry_is_one_version_with_hashes_and_names_no_place(lock: str) -> None:
    for line in lines_of(lock):
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+ ;[^@:]+?( +--hash=sha256:[0-9a-f]{64})+ *", line), line
    assert not re.search(r"://|file:|--(extra-)?index|--find-links|(?m:(^|\s)/)", (ROOT / "locks" / f"{lock}.txt").read_text())


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_is_locked_within_its_range(lock: str, python: str, project: dict[str, Any]) -> None:
    versions = locked(lock, python)
    for requirement in applying(asked(project, lock), python):
        found = versions.get(canonicalize_name(requirement.name))
        assert found is not None and requirement.specifier.contains(found), f"{requirement}: {found}; run make lock"


@pytest.mark.parametrize("lock", ["runtime", "export", "test"])
def test_nothing_is_locked_that_nothing_asks_for(lock: str, project: dict[str, Any], licences: ModuleType) -> None:
    known = {canonicalize_name(each.name): each for each in distributions()}
    missing = locked(lock, HERE).keys() - known.keys()
    assert not missing, f"{missing} are not installed: run make .venv/.test"
    reached = licences.closure(asked(project, lock), known, HERE)
    assert locked(lock, HERE).keys() == reached - {"torch"}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", PYTHONS)
def test_the_smaller_locks_are_parts_of_the_largest(python: str, machine: str) -> None:
    runtime, export, everything = (locked(lock, python, machine) for lock in LOCKS[:3])
    assert runtime.items() <= export.items() <= everything.items()
    assert not runtime.keys() & {"torch", "transformers", "onnx", "safetensors", "optimum"}


def test_what_torch_asks_for_is_what_was_solved(project: dict[str, Any]) -> None:
    noted = project["tool"]["uv"]["dependency-metadata"][0]
    torch = next(each for each in distributions(name="torch"))
    named = [Requirement(each) for each in torch.requires or []]
    plain = {str(each) for each in named if each.marker is None or each.marker.evaluate({"extra": ""})}
    assert torch.version.partition("+")[0] == noted["version"]
    # A build for CUDA asks for more, which is not ours to lock.
    assert {str(Requirement(each)) for each in noted["requires-dist"]} == {each for each in plain if not _cuda(each)}


def _cuda(requirement: str) -> bool:
    return requirement.startswith(("nvidia-", "cuda-", "triton"))


def test_the_makefile_installs_from_the_locks_by_hash(project: dict[str, Any]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    variables = dict(re.findall(r"^([A-Z_]+) :?= (.+)$", makefile, re.MULTILINE))
    assert {"--require-hashes", "--no-deps", "--no-build-isolation"} <= set(variables["EXACT"].split())
    assert all(variables[name].count("$(EXACT)") == 1 for name in ("LOCKED", "UV_LOCKED"))
    assert set(variables["EXTRAS"].split()) == set(project["project"]["optional-dependencies"])
    assert variables["TORCH"] == f"torch=={project['tool']['uv']['dependency-metadata'][0]['version']}"
    # lmms-eval has an environment of its own, which no lock covers.
    installs = [line for line in makefile.splitlines() if "$(PIP)" in line and line.startswith("\t") and "$(LMMS)" not in line]
    assert len(installs) == 4 and all("$(TORCH)" in line or "--no-deps" in line for line in installs)


def test_the_build_needs_nothing_beside_the_lock(project: dict[str, Any]) -> None:
    for python in PYTHONS:
        for requirement in map(Requirement, project["build-system"]["requires"]):
            assert requirement.specifier.contains(locked("export", python)[requirement.name])


def licence_rows() -> dict[str, tuple[set[str], str, str]]:
    rows = re.findall(r"^\| ([a-z0-9-]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", (ROOT / "docs" / "licences.md").read_text(), re.M)
    return {name: (set(versions.split(", ")), licence, needs) for name, versions, licence, needs in rows if name != "package"}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_its_licence_listed(lock: str) -> None:
    rows = licence_rows()
    for python in PYTHONS:
        for name, version in locked(lock, python).items():
            assert name in rows and version in rows[name][0], f"{name} {version}: run make licences"
            assert rows[name][1] not in ("", "UNKNOWN", "not stated"), name
            assert (rows[name][2] == "runtime") == (name in locked("runtime", python) or "runtime" in rows[name][2]), name


def test_the_runtime_has_no_copyleft_but_what_is_known(licences: ModuleType) -> None:
    runtime = {name: licences.flags(licence) for name, (_, licence, needs) in licence_rows().items() if needs == "runtime"}
    assert {name: flags for name, flags in runtime.items() if flags} == {"tqdm": ["weak copyleft"]}


@pytest.mark.parametrize(
    ("licence", "flags"),
    [
        ("MIT", []),
        ("GPL-3.0-or-later", ["copyleft"]),
        ("AGPL-3.0", ["copyleft"]),
        ("GNU General Public License v3 (GPLv3)", ["copyleft"]),
        ("LGPL-2.1-only", ["weak copyleft"]),
        ("GNU Lesser General Public License v3 (LGPLv3)", ["weak copyleft"]),
        ("EPL-2.0, BSD-3-Clause", ["weak copyleft"]),
        ("Mozilla Public License 2.0 (MPL 2.0)", ["weak copyleft"]),
        ("Other/Proprietary License", ["proprietary"]),
    ],
)
def test_licences_to_know_about_are_seen(licence: str, flags: list[str], licences: ModuleType) -> None:
    assert licences.flags(licence) == flags
