"""`make test-arm`: what it asks for, what it calls equal, and what it leaves out. The emulation itself runs there alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from repository import ROOT, TESTS, tool

TOOL = tool("arm")


def record(**changed: np.ndarray) -> dict[str, np.ndarray]:
    """Return what `arm_answers` writes of two questions about one bundle, with some arrays changed."""
    rng = np.random.default_rng(0)
    arrays = {
        "texts": np.array(["red", "2"]),
        "kept": np.array([[1, 2], [0, 3]]),
        "embeds": rng.standard_normal((2, 4, 8)),
        "logits": rng.standard_normal((2, 16)),
    }
    return {f"cpu-fp32/{name}": array for name, array in (arrays | changed).items()}


def test_two_records_of_the_same_agree() -> None:
    (one,) = TOOL.agreements(record(), record())
    assert one == TOOL.Agreement("cpu-fp32", 2, 2, 2, 0.0, 0.0) and one.fits


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("texts", np.array(["red", "3"])),
        ("kept", np.array([[1, 2], [0, 2]])),
        ("embeds", 1.001 * record()["cpu-fp32/embeds"]),
        ("logits", np.full((2, 16), np.nan)),
    ],
)
def test_float32_has_to_agree_in_everything(name: str, changed: np.ndarray) -> None:
    (one,) = TOOL.agreements(record(), record(**{name: changed}))
    assert not one.fits


def test_integers_may_keep_others_and_must_answer_the_same() -> None:
    one = TOOL.Agreement("cpu-int8", questions=10, answers=10, kept=3, embeds=0.02, logits=0.05)
    assert one.fits and not replace(one, answers=7).fits and not replace(one, embeds=0.1).fits


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ((), "needs apt-get and dpkg-deb"),
        (("apt-get", "dpkg-deb"), "no qemu-aarch64-static: sudo apt-get install qemu-user-static"),
        (("apt-get", "dpkg-deb", "qemu-aarch64"), "sudo apt-get install debian-archive-keyring"),
    ],
)
def test_what_is_missing_is_one_line(there: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: program if program in there else None)
    monkeypatch.setattr(TOOL, "KEYRING", tmp_path / "none.gpg")
    with pytest.raises(SystemExit, match=message):
        TOOL.find_emulator("x86_64")
    with pytest.raises(SystemExit, match="run make test"):
        TOOL.find_emulator("aarch64")


def test_a_root_that_is_there_gets_the_processor_of_an_orin(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root.done").touch()
    root = TOOL.made_root(tmp_path, "bookworm", "http://127.0.0.1:9")
    text = (root / "proc" / "cpuinfo").read_text()
    assert text.count("CPU part	: 0xd42") == os.cpu_count()


def test_one_question_of_each_scene_is_asked(tmp_path: Path) -> None:
    rows = [{"image": f"{scene}.png", "prompt": f"{scene} {kind}?"} for scene in range(3) for kind in range(2)]
    (tmp_path / "dataset.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    asked = tool("arm_answers").questions(tmp_path / "dataset.jsonl")
    assert [(path.name, prompt) for path, prompt in asked] == [("0.png", "0 0?"), ("1.png", "1 1?"), ("2.png", "2 0?")]


def test_without_torch_what_exports_skips_and_what_fails_fails(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("import sys\nsys.modules['torch'] = None\n")
    (tmp_path / "test_file.py").write_text("import torch\ndef test_file(): pass\n")
    (tmp_path / "test_each.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef bundle():\n    import torch\n"
        "def test_exports(bundle): pass\n"
        "def test_runs(): pass\n"
        "def test_fails(): assert False\n"
        "def test_lacks_something_else(): import no_such_module\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "without_torch", "-q", "--rootdir", str(tmp_path), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{TESTS / 'support'}:{ROOT}"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "2 failed, 1 passed, 2 skipped" in result.stdout, result.stdout
