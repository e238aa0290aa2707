"""What is interrupted goes on with the same command, and ends with the plan of what was not: searches and what they learn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from edgeprune.calibration import calibrate
from edgeprune.calibration.data.journal import Journal
from edgeprune.calibration.data.samples import read_samples
from edgeprune.calibration.learn.heldout import HeldOut
from edgeprune.calibration.learn.run import LearnRequest, learn
from edgeprune.calibration.replay.episodes import Recorder
from edgeprune.calibration.search import candidates, search
from edgeprune.calibration.search.objectives import Agreement
from edgeprune.calibration.search.search import FINALISTS
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.cli import main
from edgeprune.errors import EdgePruneError
from edgeprune.io.files import append_line
from edgeprune.io.progress import SILENT
from edgeprune.methods.learned import read
from edgeprune.plan import Cut, Geometry, Weights
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime import Runtime
from edgeprune.tabletop.dataset import write_dataset

WHOLE = unpruned_plan("qwen2_vl", 3, Geometry(84, 84, 14, 2))
PLANS = [WHOLE.with_cuts(Cut("input", "uniform", keep)) for keep in (5, 1)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_dataset(folder, 40, 3, kinds=("exists",))
    return folder / "dataset.jsonl"


class Asked:
    """Counts what the model is asked, and interrupts the `last` time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times, self.last = 0, 10**9
        for owner, name in ((Recorder, "teacher_forced_logits"), (Runtime, "generate"), (Recorder, "ask")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Any) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            if self.times == self.last:
                raise KeyboardInterrupt
            self.times += 1
            return function(*arguments, **named)

        return counted


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    with monkeypatch.context() as patch:
        yield Asked(patch)


def keys_and_values(path: Path) -> Iterator[tuple[str, Any]]:
    for line in path.read_text().splitlines():
        key, value = json.loads(line)
        yield str(key), value


def test_what_is_measured_is_not_asked_again(tiny: LoadedModel, data: Path, tmp_path: Path, asked: Asked) -> None:
    samples = read_samples(data, 3)

    def measured() -> tuple[Any, ...]:
        judge = Agreement(tiny, WHOLE, samples, max_tokens=5, fit="exact", device="cpu", journal=Journal(tmp_path / "j.jsonl"))
        return [judge.score(plan, 3) for plan in PLANS], judge.divergences(PLANS)

    whole = measured()
    times, asked.times = asked.times, 0
    assert measured() == whole and asked.times == 0
    lines, known = (tmp_path / "j.jsonl").read_bytes().splitlines(keepends=True), dict(keys_and_values(tmp_path / "j.jsonl"))
    for kept in range(0, len(lines), 5):
        (tmp_path / "j.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:-4])  # a line was cut short
        asked.times = 0
        assert measured() == whole and 0 < asked.times <= times
        assert dict(keys_and_values(tmp_path / "j.jsonl")) == known


def test_what_cannot_be_kept_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgePruneError, match="Cannot write "):
        Journal(tmp_path / "file" / "j.jsonl")
    with pytest.raises(EdgePruneError, match="Cannot write /dev/full: No space left on device"):
        append_line(Path("/dev/full"), "[1, 2]")


def searched(model: Path, data: Path, output: Path) -> Result:
    size = ("--image-size", "84x84", "--max-tokens", "2", "--fit", "stretch")
    how = (*size, "--method", "auto", "--target-flops", "0.5", "--max-drop", "100%")
    command = ("calibrate", model, "--data", data, *how, "--curve", output.with_suffix(".curve.json"), "-o", output)
    return CliRunner().invoke(main, list(map(str, command)))


def test_an_interrupted_search_goes_on(
    tiny_folder: Path, data: Path, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_LEARNED", ({},))
    monkeypatch.setattr(candidates, "method_names", lambda: ["uniform", "divprune"])
    monkeypatch.setattr(candidates, "later_layers", lambda layers: [2])
    monkeypatch.setattr(search, "ENCODER_PARTNERS", 0)
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    made = searched(tiny_folder, data, whole)
    assert made.exit_code == 0, made.output
    times, asked.times = asked.times, 0
    for part in (0.1, 0.3, 0.5, 0.9):
        asked.last = int(part * times)
        assert searched(tiny_folder, data, parts).exit_code == 1
        assert not parts.exists() and (tmp_path / ".parts.json.search").is_dir()
    asked.last = 10**9
    made = searched(tiny_folder, data, parts)
    assert made.exit_code == 0, made.output
    assert parts.read_text() == whole.read_text()
    assert json.loads((tmp_path / "parts.curve.json").read_text()) == json.loads((tmp_path / "whole.curve.json").read_text())
    assert asked.times <= times + 4 * FINALISTS  # at most one sample again, under every plan that is compared
    assert not list(tmp_path.glob(".*"))


def test_settings_that_were_compared_are_not_compared_again(
    tiny: LoadedModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = LearnRequest(keep=4, least=4, rank=8, train=False, seed=0, max_tokens=2, fit="stretch", device="cpu")
    samples = read_samples(data, 24)
    measure, measured, last = HeldOut.divergences, list[str](), 5

    def counted(self: HeldOut, *arguments: Any, **named: Any) -> tuple[float, float]:
        if len(measured) == last:
            raise KeyboardInterrupt
        measured.append("")
        return measure(self, *arguments, **named)

    def learned(kept: str, **options: Any) -> Weights:
        how = replace(request, **options)
        return learn(tiny, samples, WHOLE, how, tmp_path / "plan.json", SILENT, kept=tmp_path / kept, gate=False).weights

    monkeypatch.setattr(HeldOut, "divergences", counted)
    with pytest.raises(KeyboardInterrupt):
        learned("kept", weigh=True)
    last = 10**9
    once = learned("kept", weigh=True)
    times, measured = len(measured), []
    assert learned("others", weigh=True) == once and len(measured) == times  # none of the first five was measured twice
    measured = []
    assert learned("kept", weigh=True) == once and not measured
    merged = learned("kept", weigh=True, merge=True)
    assert len(measured) == 1  # with the map that merges
    assert torch.equal(read(merged)[1]["theta"], read(once)[1]["theta"])
    learned("kept")
    assert len(measured) == 1 + times  # without weigh other divergences, so all of them
