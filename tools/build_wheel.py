"""Build the wheel so that the same sources give the same bytes, whenever and wherever it is built.

The sources are copied first, with fixed permissions: those of a checkout depend on the umask it was made under, and what an older
build left beside them would come along. Times in the archive are SOURCE_DATE_EPOCH, by
default that of the last commit. Needs setuptools, as locked.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ("pyproject.toml", "README.md", "LICENSE")
_OLDEST = "315532800"  # 1980, where the times of zip archives begin: for sources without a history


def main() -> None:
    """Build into a folder and print the sha256 of the wheel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="Where the wheel comes, in place of one that is there.")
    parser.add_argument("--source", type=Path, default=ROOT)
    given = parser.parse_args()
    wheel = build(given.folder, given.source)
    print(f"{hashlib.sha256(wheel.read_bytes()).hexdigest()}  {wheel}")


def build(folder: Path, root: Path = ROOT) -> Path:
    """Build the wheel of the sources in `root` into `folder`, in place of wheels that are there; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("edgeprune-*.whl"):
        old.unlink()
    environment = os.environ | {"SOURCE_DATE_EPOCH": source_date(root), "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        _copy(root, source)
        command += ["--wheel-dir", str(folder.resolve()), str(source)]
        subprocess.run(command, check=True, env=environment, cwd=temporary, umask=0o022)
    return next(folder.glob("edgeprune-*.whl"))


def source_date(root: Path) -> str:
    """Return the time to write into archives, in seconds since 1970: SOURCE_DATE_EPOCH, or that of the last commit, or 1980."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return given
    try:
        asked = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return _OLDEST
    return asked.stdout.strip() or _OLDEST


def _copy(root: Path, source: Path) -> None:
    shutil.copytree(root / "edgeprune", source / "edgeprune", ignore=shutil.ignore_patterns("__pycache__"))  # and what it links to
    for name in FILES:
        shutil.copy(root / name, source)
    for path in [source, *source.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


if __name__ == "__main__":
    main()
