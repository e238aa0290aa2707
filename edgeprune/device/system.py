"""How a machine is looked at: files below a root, commands through a runner, and the packages that Debian and Python know of.

Nothing here raises on what is absent or odd: it is None, or left out.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Runner = Callable[[Sequence[str]], "str | None"]  # the standard output of a command; None where there is none of it

# By distribution: the module that a program imports.
_MODULES = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime",
    "tensorrt": "tensorrt",
    "torch": "torch",
    "transformers": "transformers",
    "optimum": "optimum",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
}
_SHARED = ("onnxruntime",)  # modules that several distributions bring: only the metadata can tell which one did


@dataclass(frozen=True)
class Software:
    """What this Python has: its `version`, distributions with their versions, and the `providers` that ONNX Runtime offers.

    `isolated`: a virtual environment that does not see the system's packages.
    """

    version: tuple[int, int]
    packages: Mapping[str, str]
    providers: tuple[str, ...]
    isolated: bool

    @classmethod
    def here(cls) -> Software:
        """Return what the running Python has. ONNX Runtime is imported, nothing else."""
        found = {name: version for name in _MODULES if (version := _package_version(name)) is not None}
        return cls((sys.version_info[0], sys.version_info[1]), found, _providers(), _is_isolated())


def read_text(root: Path, path: str) -> str | None:
    """Return a file below `root` as stripped text without NULs; None when it cannot be read."""
    try:
        return (root / path).read_bytes().decode("utf-8", "replace").replace("\0", " ").strip()
    except (OSError, ValueError):
        return None


def read_number(root: Path, path: str) -> int | None:
    """Return the integer in a file below `root`; None when there is none."""
    try:
        return int(read_text(root, path) or "")
    except ValueError:
        return None


def run_command(command: Sequence[str]) -> str | None:
    """Return what a command prints; None when it is missing, fails or takes longer than 5 s."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout if result.returncode == 0 else None


def installed_debs(status: str | None, names: Collection[str]) -> dict[str, str]:
    """Return the versions of installed Debian packages in the text of /var/lib/dpkg/status."""
    found = {}
    for paragraph in (status or "").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and not line.startswith(" "))
        if fields.get("Package") in names and fields.get("Status", "").endswith(" installed") and "Version" in fields:
            found[fields["Package"]] = fields["Version"]
    return found


def version_numbers(text: str | None) -> tuple[int, ...]:
    """Return (10, 3, 0, 30) of "10.3.0.30-1+cuda12.5": the leading numbers, an epoch left out; () when there are none."""
    numbers = []
    for part in (text or "").rpartition(":")[2].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not 0 < len(digits) < 10:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    # Debian's packages do not always bring metadata. A namespace is none of them: our own wheel has a file in optimum's.
    spec = None if _MODULES[name] in _SHARED else importlib.util.find_spec(_MODULES[name])
    return "unknown" if spec is not None and spec.origin is not None else None


def _providers() -> tuple[str, ...]:
    try:
        import onnxruntime

        return tuple(onnxruntime.get_available_providers())
    except Exception:  # a wheel for another machine fails with errors of many types
        return ()


def _is_isolated() -> bool:
    if sys.prefix == sys.base_prefix:
        return False
    settings = read_text(Path(sys.prefix), "pyvenv.cfg") or ""
    lines = [line.replace(" ", "").lower() for line in settings.splitlines()]
    return "include-system-site-packages=true" not in lines
