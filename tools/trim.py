"""Delete from an installed base runtime what it never opens, so that it takes less room on a robot.

Packages that others ask for and that no code of the runtime imports, the libraries for programs in C, tests, and bytecode, which
Python makes again where it may write. Only for an installation without extras: these need some of it.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

# What the runtime imports; everything else that pip brought is there for other uses of these.
USED = ("click", "edgeprune", "jinja2", "markupsafe", "numpy", "onnxruntime", "pillow", "rich", "tokenizers")
UNUSED = (
    *("anyio", "exceptiongroup", "filelock", "fsspec", "h11", "hf-xet", "httpcore2", "httpx2", "huggingface-hub", "idna", "pyyaml"),
    *("tqdm", "truststore", "typing-extensions"),  # tokenizers asks for them, to download models
    *("coloredlogs", "flatbuffers", "humanfriendly", "mpmath", "packaging", "protobuf", "sympy"),  # onnxruntime, for its tools
    *("markdown-it-py", "mdurl", "pygments"),  # rich, to show Markdown and source code
    "tomli",
)
BESIDE = ("pip", "setuptools", "wheel")  # what venv puts there: no part of the runtime, and left alone
FILES = (
    "onnxruntime/capi/libonnxruntime.so*",  # the engine once more, for programs in C
    "onnxruntime/transformers",
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "numpy/**/tests",
    "**/__pycache__",
)


def main() -> None:
    """Trim a folder and print its size before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="A site-packages folder, or one that `pip install --target` filled.")
    folder = parser.parse_args().folder
    before = size(folder)
    trim(folder)
    print(f"{before / 1e6:.1f} MB -> {size(folder) / 1e6:.1f} MB in {folder}")


def trim(folder: Path) -> None:
    """Delete what is not used; raise SystemExit where there is more than the base runtime."""
    found = {_name(each): each for each in distributions(path=[str(folder)])}
    others = sorted(set(found) - {*USED, *UNUSED, *BESIDE})
    if "edgeprune" not in found or others:
        raise SystemExit(f"{folder} is no base runtime alone: it has {', '.join(others) or 'no edgeprune'}. Nothing was deleted.")
    for name in UNUSED:
        if name in found:
            _uninstall(found[name], folder)
    for pattern in FILES:
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in sorted(_folders(folder), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()


def size(folder: Path) -> int:
    """Return the bytes of all files of the runtime in a folder: what `BESIDE` names does not count."""
    foreign = {
        Path(str(each.locate_file(file)))
        for each in distributions(path=[str(folder)])
        if _name(each) in BESIDE
        for file in each.files or ()
    }
    files = (path for path in folder.rglob("*") if path.is_file() and path not in foreign)
    return sum(path.stat().st_size for path in files if not _beside(path, folder))


def _beside(path: Path, folder: Path) -> bool:
    return path.relative_to(folder).parts[0] in (*BESIDE, "pkg_resources", "_distutils_hack")  # bytecode that no record lists


def _uninstall(package: Distribution, folder: Path) -> None:
    # Only below the folder, and the commands of its environment: what `--target` filled has records that point elsewhere.
    around = folder.resolve().parents[2] if (folder.resolve().parents[2] / "pyvenv.cfg").is_file() else None
    mine = [folder.resolve(), *([around / "bin"] if around else [])]
    for file in package.files or ():
        path = Path(os.path.normpath(folder.resolve() / file))
        if any(path.is_relative_to(each) for each in mine):
            path.unlink(missing_ok=True)


def _folders(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_dir())


def _name(package: Distribution) -> str:
    return package.name.lower().replace("_", "-")


if __name__ == "__main__":
    main()
