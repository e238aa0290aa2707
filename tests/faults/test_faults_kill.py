"""Processes that are killed, and disks that are full, at every step of what writes: nothing half-written is ever accepted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fault_driver import FAULTS
from repository import TESTS

from edgeprune.bundle import Bundle, is_bundle

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("merge", "build", "sign")]
NIGHTLY = [pytest.param(name, marks=pytest.mark.nightly) for name in ("export", "calibrate")]
# Fewer steps than these would mean that faults are no longer seen where they were.
LEAST = {"merge": 3, "build": 20, "sign": 3, "export": 20, "calibrate": 10}


@pytest.fixture(scope="module")
def tallied(tiny_folder: Path, tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Return what tells what came of every fault of a scenario, by the kind of fault."""

    @cache
    def tallied(name: str) -> dict[str, Any]:
        paths = (tmp_path_factory.mktemp("faults"), tiny_folder, tiny_bundle.path)
        command = [sys.executable, "fault_driver.py", *map(str, paths), name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        folder = TESTS / "support" / "faults"
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return {fault: tally for line in done.stdout.splitlines() for fault, tally in json.loads(line)[name].items()}

    return tallied


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", [*SLOW, *NIGHTLY])
def test_a_fault_at_every_step(name: str, fault: str, tallied: Callable[[str], dict[str, Any]], record_property: Any) -> None:
    tally = tallied(name)[fault]
    assert tally["wrong"] == []
    assert tally["faults"] >= (LEAST[name] if fault == "kill" else 2)
    record_property("faults", tally["faults"])


@pytest.mark.nightly
def test_an_export_that_is_killed_while_it_traces(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from edgeprune.cli import main; main()",
        "export",
        "tabletop",
        "-o",
        str(tmp_path / "b"),
        "--method",
        "random",
    ]
    with subprocess.Popen([*command, "--keep", "0.5"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while not list(tmp_path.glob(".b.*/onnx/*.onnx")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        process.kill()
    assert not (tmp_path / "b").exists()
    (left,) = tmp_path.iterdir()
    assert not is_bundle(left)
