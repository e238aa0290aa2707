"""The wheel alone in a new environment: the base runtime as a robot has it, without extras."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from repository import ROOT, tool

from edgeprune.bundle import Bundle

MOST = 150_000_000  # bytes of an installed runtime
QUESTION = "What is it?"
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a new environment with the wheel and what locks/runtime.txt says, and nothing else of ours."""
    folder = tmp_path_factory.mktemp("alone")
    wheel = tool("build_wheel").build(folder / "dist")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    pip = [*_PIP, "--python", str(folder / "env" / "bin" / "python"), "install", "--quiet", "--no-compile"]
    locked = [*pip, "--no-deps", "--require-hashes", "-r", str(ROOT / "locks" / "runtime.txt")]
    result = subprocess.run(locked, capture_output=True, text=True)
    if result.returncode and not _index_answers(folder):
        pytest.skip("no package index can be reached")
    assert result.returncode == 0, result.stderr
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
    return folder / "env"


@pytest.fixture(scope="module")
def picture(tiny_image: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    tiny_image.save(path)
    return path


def run(environment: Path, *command: str) -> str:
    """Run a program of the environment outside the tree, and return what it says."""
    asked = [str(environment / "bin" / command[0]), *command[1:]]
    result = subprocess.run(asked, capture_output=True, text=True, cwd=environment, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def site(environment: Path) -> Path:
    return next((environment / "lib").glob("python3.*")) / "site-packages"


def answers(environment: Path, bundle: Bundle, picture: Path) -> str:
    return run(
        environment, "edgeprune", "run", str(bundle.path), "--image", str(picture), "--prompt", QUESTION, "--max-tokens", "8"
    )


def _index_answers(folder: Path) -> bool:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "click"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def whole(environment: Path, tiny_bundle: Bundle, picture: Path) -> str:
    """Return what the runtime answers before anything is deleted."""
    return answers(environment, tiny_bundle, picture)


@pytest.mark.slow
@pytest.mark.network
def test_it_answers_without_extras(environment: Path, whole: str) -> None:
    assert whole.strip()
    assert "export" in run(environment, "edgeprune", "--help")
    subprocess.run([*_PIP, "--python", str(environment / "bin" / "python"), "check"], check=True, capture_output=True)
    have = {path.name for path in site(environment).iterdir()}
    assert not have & {"torch", "transformers", "onnx", "optimum.py", "safetensors", "starlette", "cyclonedds", "cryptography"}


@pytest.mark.slow
@pytest.mark.network
def test_trimmed_it_answers_the_same_in_less_than_150_mb(environment: Path, whole: str, tiny_bundle: Bundle, picture: Path) -> None:
    trim = tool("trim")
    before = trim.size(site(environment))
    trim.trim(site(environment))
    after = trim.size(site(environment))
    assert after < MOST < before, (before, after)
    assert answers(environment, tiny_bundle, picture) == whole
    assert "export" in run(environment, "edgeprune", "--help")


def test_only_a_base_runtime_is_trimmed(tmp_path: Path) -> None:
    trim = tool("trim").trim
    with pytest.raises(SystemExit, match="no edgeprune"):
        trim(tmp_path)
    for name in ("edgeprune", "starlette", "tqdm"):
        record = tmp_path / f"{name}-1.0.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    with pytest.raises(SystemExit, match="starlette"):
        trim(tmp_path)
    assert (tmp_path / "tqdm-1.0.dist-info" / "METADATA").is_file()


def test_everything_that_is_locked_for_the_runtime_is_either_used_or_deleted() -> None:
    trim = tool("trim")
    lock = (ROOT / "locks" / "runtime.txt").read_text()
    names = {line.partition("==")[0] for line in lock.splitlines() if line and line[0].isalpha()}
    assert names == {*trim.USED, *trim.UNUSED} - {"edgeprune"}
