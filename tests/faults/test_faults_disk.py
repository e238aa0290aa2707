"""Disks that are really full: a small one where one may be mounted, and a limit of the kernel's on files anywhere.

Unlike the faults that tests inject, these meet what native code writes too.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.plan import KeepPlan

ENTRY = (sys.executable, "-c", "from edgeprune.cli import main; main()")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return what mounts a disk of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting a disk is not allowed here")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True, check=False)


def limit_files(size: int) -> Callable[[], None]:
    """Return what a child does first so that no file of its may grow beyond a size: it gets an error, not the signal."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def refused(*words: object, before: Callable[[], None] | None = None) -> str:
    """Run a command that must end with code 1 and one line; return the line."""
    command = [*ENTRY, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, preexec_fn=before)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("Error:") == 1 and "Traceback" not in done.stderr, done.stderr
    return next(line for line in done.stderr.splitlines() if "Error:" in line)


def export(model: Path, plan: KeepPlan, folder: Path) -> tuple[object, ...]:
    """Return the words of an export over a former bundle, beside which its plan lies."""
    plan.save(folder / "plan.json")
    return ("export", model, "-o", folder / "bundle", "--plan", folder / "plan.json", "--force")


@pytest.mark.parametrize("size", [pytest.param(100, marks=pytest.mark.slow), 20_000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_an_export_that_may_write_no_larger_file(size: int, tiny_folder: Path, tiny_plan: KeepPlan, altered_bundle: Path) -> None:
    altered_bundle = altered_bundle.rename(altered_bundle.with_name("bundle"))
    words = export(tiny_folder, tiny_plan, altered_bundle.parent)
    assert "File too large" in refused(*words, before=limit_files(size))
    assert Bundle.load(altered_bundle).plan == tiny_plan
    assert {path.name for path in altered_bundle.parent.iterdir()} == {"bundle", "plan.json"}


@pytest.mark.slow
def test_a_calibration_that_may_write_no_larger_file(tiny_folder: Path, tiny_image: Image.Image, tmp_path: Path) -> None:
    tiny_image.save(tmp_path / "scene.png")
    (tmp_path / "samples.jsonl").write_text(json.dumps({"image": "scene.png", "prompt": "What is it?"}))
    words = ["calibrate", tiny_folder, "--method", "plphp", "--budget", "0.5", "--data", tmp_path / "samples.jsonl"]
    words += ["--max-tokens", 2, "--image-size", "84x112", "-o", tmp_path / "plan.json"]
    assert "File too large" in refused(*words, before=limit_files(100))
    assert {path.name for path in tmp_path.iterdir()} == {"scene.png", "samples.jsonl"}


@pytest.mark.nightly
@pytest.mark.parametrize("size", range(1 << 16, 13 << 16, 1 << 16))
def test_an_export_onto_a_disk_that_fills(size: int, tiny_folder: Path, tiny_plan: KeepPlan, disk: Callable[[int], Path]) -> None:
    folder = disk(size)
    line = refused(*export(tiny_folder, tiny_plan, folder))
    assert "No space left on device" in line or "free" in line
    assert [path.name for path in folder.iterdir()] == ["plan.json"]
