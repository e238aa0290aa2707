"""What a robot installs resolves to binary wheels on both JetPacks: aarch64 with Python 3.10 (JetPack 6) and 3.12 (JetPack 7)."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Ubuntu 22.04 under JetPack 6 has glibc 2.35; JetPack 7 is newer, so what installs here installs there.
PLATFORMS = (*(f"manylinux_2_{minor}" for minor in range(35, 16, -1)), "manylinux2014")
ON_ROBOTS = ("tensorrt", "serve", "structured", "telemetry", "sign", "parquet", "plot", "ray", "ros2")
WITHOUT_WHEELS = {"check": "tensorrt-rtx"}  # what stands in the way
ELSEWHERE = ("export", "docs", "test")  # nothing that a robot needs

both = pytest.mark.parametrize("python", ["3.10", "3.12"])


def resolve(python: str, extras: tuple[str, ...], folder: Path) -> set[str]:
    """Return the names of all packages that pip would install; raise RuntimeError with pip's words when it finds no wheels."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--only-binary=:all:"]
    command += [f"--platform={platform}_aarch64" for platform in PLATFORMS]
    command += ["--implementation=cp", f"--python-version={python}", "--target", str(folder), "--report", str(report)]
    result = subprocess.run([*command, *asked(python, extras)], capture_output=True, text=True)
    if result.returncode and not _index_answers(folder):
        pytest.skip("no package index can be reached")
    if result.returncode:
        raise RuntimeError(result.stderr)
    return {canonicalize_name(entry["metadata"]["name"]) for entry in json.loads(report.read_text())["install"]}


def asked(python: str, extras: tuple[str, ...]) -> list[str]:
    """Return the requirements of some extras. pip judges markers by the Python that runs it, so they are judged here."""
    there = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": "aarch64"}
    wanted = map(Requirement, requires("edgeprune") or [])
    return [
        f"{each.name}{each.specifier}"
        for each in wanted
        if each.marker is None or any(each.marker.evaluate({**there, "extra": extra}) for extra in extras)
    ]


@pytest.mark.network
@both
def test_the_install_resolves_for_jetson(python: str, tmp_path: Path) -> None:
    names = resolve(python, ("tensorrt",), tmp_path)
    assert {"numpy", "onnxruntime", "tokenizers", "pillow"} <= names
    assert not names & {"torch", "transformers", "onnx"}
    assert not [name for name in names if name.startswith(("cuda", "nvidia"))]  # only JetPack's CUDA runtime fits its driver


@pytest.mark.slow
@pytest.mark.network
@both
def test_every_extra_of_a_robot_resolves_for_jetson(python: str, tmp_path: Path) -> None:
    names = resolve(python, ON_ROBOTS, tmp_path)
    assert {"starlette", "llguidance", "prometheus-client", "cryptography", "pyarrow", "matplotlib", "ray"} <= names
    assert {"eclipse-zenoh", "rosbags", "xxhash"} <= names and "cyclonedds" not in names
    assert not [name for name in names if name.startswith(("cuda", "nvidia", "torch"))]


@pytest.mark.slow
@pytest.mark.network
@both
@pytest.mark.parametrize(("extra", "package"), WITHOUT_WHEELS.items())
def test_what_has_no_wheels_for_jetson_is_known(extra: str, package: str, python: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=rf"No matching distribution found for {package}\b"):
        resolve(python, (extra,), tmp_path)


def test_no_extra_is_forgotten() -> None:
    assert sorted([*ON_ROBOTS, *WITHOUT_WHEELS, *ELSEWHERE]) == sorted(metadata("edgeprune").get_all("Provides-Extra") or [])


def _index_answers(folder: Path) -> bool:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "click"]
    return subprocess.run(command, capture_output=True).returncode == 0
