"""The examples of the runtime do what their pages say, and the code of docs/runtime.md and docs/tiers.md runs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from repository import ROOT

from edgeprune import registry
from edgeprune.checkpoint.loading import load_model, resolve_model
from edgeprune.cli import main
from edgeprune.errors import UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.methods.base import LayerView, keep_best
from edgeprune.plan import Cut, Geometry
from edgeprune.plan.presets import staircase_plan, unpruned_plan
from edgeprune.plan.tiers import Tiers
from edgeprune.registry import allow_method, method_class
from edgeprune.runtime import load
from edgeprune.tabletop.dataset import write_dataset

EXAMPLES = ROOT / "examples"
OWN = "alternating:Alternating"
KEEPS = {"quality": 0.75, "balanced": 0.5, "fast": 0.25}
SECONDS = 300  # on a machine with much else to do


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundled model under three tiers."""
    loaded = load_model(resolve_model("tabletop"))
    base = unpruned_plan(loaded.folder.model_type, loaded.decoder_shape().layers, loaded.geometry(None))
    tiers = Tiers.of({name: staircase_plan(base, "fastv", [keep], [2]) for name, keep in KEEPS.items()})
    return export_bundle(loaded, tiers, tmp_path_factory.mktemp("tiers") / "table.bundle").path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of drawn scenes."""
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    write_dataset(folder, 3, 1)
    return folder / "images"


@contextmanager
def start(example: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Yield a running example, and leave none behind."""
    command = [sys.executable, str(EXAMPLES / example), *map(str, arguments)]
    # Where these tests run in the background, a shell has Ctrl-C ignored for them and for all that they start.
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heard, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def run(example: str, *arguments: object, code: int = 0) -> str:
    with start(example, *arguments) as process:
        output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == code, errors
    return output


def test_asking_tells_what_happened(bundle: Path, scenes: Path) -> None:
    output = run("ask/ask_image.py", bundle, scenes / "000000.png", "What does the label say?", "--tier", "balanced")
    once, again = output.split("  reused    nothing\n")
    assert output.count("F7\n") == 2
    assert "tier      balanced (asked for)" in once
    assert "cut       fastv @ layer 2: 144 -> 72 visual tokens" in once
    assert "reused    vision" in again
    assert re.search(r"TTFT +[\d.]+ ms = preprocess [\d.]+ \+ vision 0\.0 ", again)


def test_asking_about_no_image_is_one_line(bundle: Path) -> None:
    with start("ask/ask_image.py", bundle, "none.png", "What is it?") as process:
        _, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors.count("\n")) == (1, 1)
    assert "There is no image 'none.png'" in errors


def test_the_camera_drops_frames_and_keeps_deadlines(bundle: Path) -> None:
    answers = ("--answers", 4, "--deadline-ms", 60_000, "--deadline-ms", 1)
    lines = run("camera/camera.py", bundle, *answers).splitlines()
    rows = [line.split(maxsplit=2) for line in lines[1:5]]
    assert [row[0] for row in rows] == ["60000.0", "1.0"] * 2
    assert rows[0][1] == "quality"
    assert "deadline" in lines[2]
    assert re.fullmatch(r"\d+ frames came, \d+ were dropped", lines[5])


def test_the_camera_ends_by_ctrl_c(bundle: Path) -> None:
    with start("camera/camera.py", bundle, "--answers", 10**6) as process:
        assert process.stdout is not None
        for _ in range(2):
            assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (0, "")
    assert "stopped\n" in output


def test_an_inspection_fails_where_a_check_fails(bundle: Path, scenes: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    stations = [f"left={scenes}/000000.png", f"right={scenes}/000002.png"]
    output = run("inspection/inspection.py", bundle, EXAMPLES / "inspection/checklist.json", "-o", report, *stations, code=1)
    assert "right: no red cube failed, answer 'yes'" in output
    written: dict[str, list[dict[str, Any]]] = json.loads(report.read_text())
    assert all(entry["passed"] for entry in written["left"])
    assert [entry["reused"] for entry in written["left"]] == [[], *[["vision"]] * 3]
    assert isinstance(written["left"][1]["answer"], int)


def test_an_inspection_passes(bundle: Path, scenes: Path, tmp_path: Path) -> None:
    checks = [{"name": "no red cube", "ask": "Is there a red cube?", "choices": ["yes", "no"], "accept": ["no"]}]
    (tmp_path / "checks.json").write_text(json.dumps(checks))
    station = f"left={scenes}/000000.png"
    run("inspection/inspection.py", bundle, tmp_path / "checks.json", "-o", tmp_path / "report.json", station, "--chat")
    (tmp_path / "checks.json").write_text('[{"name": "no question"}]')
    run("inspection/inspection.py", bundle, tmp_path / "checks.json", "-o", tmp_path / "none.json", station, code=1)
    assert not (tmp_path / "none.json").exists()


def test_serving(bundle: Path, scenes: Path) -> None:
    output = run("serving/serving.py", bundle, scenes / "000000.png")
    assert re.search(r"whole +F7; TTFT", output)
    assert re.search(r"as JSON +0\n", output)
    assert re.search(r"a choice +no\n", output)
    assert 'edgeprune_answers_total{finish_reason="cancelled"' in output


def test_several_clients(bundle: Path, scenes: Path) -> None:
    options = ("--clients", "1,2", "--tokens", 4, "--seconds", 0.2, "--threads", 1)
    header, *lines = run("serving/clients.py", bundle, scenes / "000000.png", *options).splitlines()
    assert header.startswith("clients") and [line.split()[0] for line in lines] == ["1", "2"]


@pytest.mark.slow
def test_companions_change_no_answer(bundle: Path, scenes: Path) -> None:
    output = run("serving/companions.py", bundle, "--data", scenes.parent / "dataset.jsonl", "--parallel", 2)
    (same, asked), (described, images) = re.findall(r"(\d+) of (\d+) answered the same", output)
    assert same == asked and described == images


@pytest.mark.slow
def test_own_data_is_calibrated_and_measured(tiny_folder: Path, tmp_path: Path) -> None:
    other = ("--model", tiny_folder, "--image-size", "84x112", "--fit", "stretch")
    output = run("own_data/own_data.py", tmp_path / "own", "--scenes", 1, "--limit", 2, *other)
    rows = [line for line in output.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| quality", "| balanced", "| fast", "| no pruning"]
    kept = [float(row.split(" | ")[-1].split()[0]) for row in rows[1:]]
    assert kept[0] >= kept[1] >= kept[2] < kept[3]
    assert "answer" not in (tmp_path / "own" / "calibration.jsonl").read_text()


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return the module of the example's method, which nobody has allowed yet."""
    monkeypatch.setattr(registry, "_allowed", set())
    monkeypatch.syspath_prepend(str(EXAMPLES / "own_method"))
    yield import_module("alternating")
    sys.modules.pop("alternating", None)


def test_the_own_method_takes_from_both_orders(own: Any) -> None:
    # Most attention: 5, 4, 3, ... On a grid of 1 x 6 the spread begins with 2, 5, 0.
    method = own.Alternating(Cut("layer", OWN, 4, 2), Geometry(16, 96, 16, 1))
    seen = LayerView(torch.arange(6), 1, lambda: torch.arange(6.0)[None] / 15)
    assert keep_best(method.score(seen), 1).tolist() == [5]
    assert keep_best(method.score(seen), 4).tolist() == [2, 3, 4, 5]


def test_an_own_method_is_exported_and_runs_without_its_code(
    own: Any, tiny_folder: Path, tiny_image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, path = CliRunner(), str(tmp_path / "bundle")
    pruned = ["--image-size", "84x112", "--method", OWN, "--keep", "0.5", "--layer", "1"]
    made = runner.invoke(main, ["export", str(tiny_folder), "-o", path, *pruned])
    assert made.exit_code == 0, made.output
    plan = str(tmp_path / "bundle" / "plan.json")
    monkeypatch.setattr(registry, "_allowed", set())
    for command in (["verify", path], ["export", str(tiny_folder), "-o", f"{path}2", "--plan", plan]):
        refused = runner.invoke(main, command)
        assert (refused.exit_code, f"--own-method {OWN}" in refused.stderr) == (2, True)
    assert runner.invoke(main, ["verify", path, "--own-method", OWN]).exit_code == 0

    monkeypatch.delitem(sys.modules, "alternating")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.endswith("own_method")])
    receipt = load(path).generate(tiny_image, "What is it?", max_tokens=2).receipt
    assert [(cut.cut, cut.after) for cut in receipt.cuts] == [(f"{OWN} @ layer 1", 6)]
    assert "alternating" not in sys.modules


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("alternating", "Unknown method"),
        ("os:system", "no class system with `sites`"),
        ("alternating:Nothing", "no class Nothing"),
        ("nowhere.near:Method", "no module nowhere"),
    ],
)
def test_what_is_no_method_is_refused(name: str, words: str, own: Any) -> None:
    if ":" in name:
        with pytest.raises(UsageError, match="code from outside"):
            method_class(name)
        allow_method(name)
    with pytest.raises(UsageError, match=words):
        method_class(name)


@pytest.mark.parametrize("reference", ["fastv", "own:", "/tmp/own:Method", "own:Method "])
def test_what_is_no_name_of_a_method_is_not_allowed(reference: str) -> None:
    with pytest.raises(UsageError, match=r"Write package\.module:Class"):
        allow_method(reference)


def test_what_an_own_method_needs_itself_is_not_hidden(own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_method.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    allow_method("broken_method:Method")
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        method_class("broken_method:Method")


@pytest.mark.parametrize("page", ["runtime.md", "tiers.md"])
def test_the_code_of_the_pages_runs(page: str, bundle: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table.bundle").symlink_to(bundle)
    for name, number in (("table", 0), ("other", 1)):
        (tmp_path / f"{name}.png").symlink_to(scenes / f"{number:06}.png")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / page).read_text()
    blocks = [
        (match.group(1), text[: match.start(1)].count("\n")) for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)
    ]
    assert blocks
    namespace: dict[str, Any] = {}
    for block, line in blocks:
        exec(compile("\n" * line + block, page, "exec"), namespace)  # the page's own code
