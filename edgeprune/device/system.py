"""Access to a machine: files below a root, commands through a runner, and packages of Debian and Python.

These functions do not raise for missing or malformed data: they return None or omit it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Runner = Callable[[Sequence[str]], "str | None"]  # returns a command's standard output; None if it fails

# Distribution -> the module that programs import.
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
_SHARED = ("onnxruntime",)  # modules of several distributions: only metadata identifies the installed one


@dataclass(frozen=True)
class Software:
    """Software of a Python: its `version`, versions of distributions, and ONNX Runtime's `providers`.

    `isolated`: a virtual environment without the system's packages.
    """

    version: tuple[int, int]
    packages: Mapping[str, str]
    providers: tuple[str, ...]
    isolated: bool

    @classmethod
    def here(cls) -> Software:
        """Return the software of the running Python. Only ONNX Runtime is imported."""
        found = {name: version for name in _MODULES if (version := _package_version(name)) is not None}
        return cls((sys.version_info[0], sys.version_info[1]), found, _providers(), _is_isolated())


def read_text(root: Path, path: str) -> str | None:
    """Return a file below `root` as stripped text without NULs; None if it cannot be read."""
    try:
        return (root / path).read_bytes().decode("utf-8", "replace").replace("\0", " ").strip()
    except (OSError, ValueError):
        return None


def read_number(root: Path, path: str) -> int | None:
    """Return the integer in a file below `root`; None if there is none."""
    try:
        return int(read_text(root, path) or "")
    except ValueError:
        return None


def has_byte_products(root: Path = Path("/")) -> bool | None:
    """Return whether the CPU has instructions that add products of 8-bit integers in 32 bits; None where that is unknown.

    x86 calls them VNNI, also as a part of AMX. Without them such products take three to four times as long, and the fastest of
    ONNX Runtime's kernels for them add in 16 bits, which overflows. Arm's kernels add in 32 bits with and without.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    flags = re.search(r"^flags\s*:(.*)$", read_text(root, "proc/cpuinfo") or "", re.MULTILINE)
    return None if flags is None else not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(flags[1].split())


def run_command(command: Sequence[str]) -> str | None:
    """Return a command's output; None if it is missing, fails or takes longer than 5 s."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout if result.returncode == 0 else None


def installed_debs(status: str | None, names: Collection[str]) -> dict[str, str]:
    """Return the versions of installed Debian packages, parsed from the text of /var/lib/dpkg/status."""
    found = {}
    for paragraph in (status or "").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and not line.startswith(" "))
        if fields.get("Package") in names and fields.get("Status", "").endswith(" installed") and "Version" in fields:
            found[fields["Package"]] = fields["Version"]
    return found


def version_numbers(text: str | None) -> tuple[int, ...]:
    """Return (10, 3, 0, 30) for "10.3.0.30-1+cuda12.5": the leading numbers without an epoch; () if there are none."""
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
    # Some Debian packages have no metadata. A namespace package does not count: our own wheel has a file in optimum's.
    spec = None if _MODULES[name] in _SHARED else importlib.util.find_spec(_MODULES[name])
    return "unknown" if spec is not None and spec.origin is not None else None


def _providers() -> tuple[str, ...]:
    try:
        import onnxruntime

        return tuple(onnxruntime.get_available_providers())
    except Exception:  # a wheel for another machine raises errors of many types
        return ()


def _is_isolated() -> bool:
    if sys.prefix == sys.base_prefix:
        return False
    settings = read_text(Path(sys.prefix), "pyvenv.cfg") or ""
    lines = [line.replace(" ", "").lower() for line in settings.splitlines()]
    return "include-system-site-packages=true" not in lines
