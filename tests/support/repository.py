"""The repository's folders, and the scripts in tools/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
TOOLS = ROOT / "tools"


def tool(name: str) -> ModuleType:
    """Return the script tools/NAME.py as a module, under a name of its own."""
    known = f"tools_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, TOOLS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)  # before it runs: dataclasses look their module up
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]
