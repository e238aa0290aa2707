"""The wheel holds the whole package and nothing else, and the tree keeps its shape."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import edgeprune

ROOT = Path(__file__).parent.parent
MAPPED = {"edgeprune": "edgeprune", "export": "edgeprune/export", "runtime": "edgeprune/runtime"}
MAPPED |= {"calibration": "edgeprune/calibration"}
REGISTER = {"export/register": "optimum/commands/register"}  # in optimum's namespace, where an __init__.py would break it
LONGEST_FILE = 300  # lines


def sources(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    # From a copy: setuptools builds inside the source, and an old build/lib there would bring deleted modules back.
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    for folder in MAPPED:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run([*command, "--quiet", "--disable-pip-version-check"], check=True, cwd=out)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_module_and_nothing_else(wheel_names: set[str]) -> None:
    places = {
        path: f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in MAPPED.items()
        for path in sources(folder)
    }
    places |= {path: f"{target}/{path.name}" for folder, target in REGISTER.items() for path in sources(folder)}
    expected = set(places.values())
    assert {name for name in wheel_names if name.endswith(".py")} == expected
    data = {name for name in wheel_names - expected if not name.startswith("edgeprune/tabletop/model/")}
    assert data == {"edgeprune/py.typed", "edgeprune/report/page.html.jinja"}


def test_the_wheel_holds_the_model(wheel_names: set[str]) -> None:
    model = {path.name for path in (ROOT / "edgeprune" / "tabletop" / "model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"} <= model
    assert {name.rpartition("/")[2] for name in wheel_names if "tabletop/model/" in name} == model


def test_the_model_stays_small() -> None:
    size = sum(path.stat().st_size for path in (ROOT / "edgeprune" / "tabletop" / "model").iterdir())
    assert size <= 16 * 1024 * 1024


@pytest.mark.parametrize("folder", [*MAPPED, "tests", "examples"])
def test_files_stay_small_and_have_a_subject(folder: str) -> None:
    for path in sources(folder):
        assert len(path.read_text().splitlines()) <= LONGEST_FILE, path
        assert path.stem not in {"utils", "helpers", "common", "misc"}, path


def test_every_package_folder_is_a_package() -> None:
    for folder in MAPPED:
        for parent in {path.parent for path in sources(folder)}:
            assert (parent / "__init__.py").is_file() != (parent.relative_to(ROOT).as_posix() in REGISTER), parent


def test_the_two_versions_agree() -> None:
    assert version("edgeprune") == edgeprune.__version__
