"""Tests of what needs no torch do not import it: they start in a second."""

from __future__ import annotations

import subprocess
import sys

from repository import ROOT, TESTS

PURE = ("benchmark", "io", "lint", "runtime/backends", "runtime/ros2", "runtime/server", "runtime/telemetry", "tabletop")


def test_pure_tests_do_not_import_torch() -> None:
    arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", *(str(TESTS / folder) for folder in PURE)]
    code = f"""
import sys, pytest
print("CODE", int(pytest.main({arguments!r})))
print("HEAVY", sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "CODE 0" in done.stdout, done.stdout[-2000:]
    assert "HEAVY []" in done.stdout, done.stdout[-200:]
