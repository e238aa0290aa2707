"""The scenarios that need torch: export and calibrate."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from fault_scenarios import Scenario, Step
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.calibration import calibrate as commands
from edgeprune.calibration.collect import run as collecting
from edgeprune.calibration.data.statistics import Statistics
from edgeprune.checkpoint.loading import load_model, resolve_model
from edgeprune.cli import main as command_line
from edgeprune.errors import EdgePruneError
from edgeprune.export import exporter
from edgeprune.io.progress import Silent
from edgeprune.plan import KeepPlan


class _Steps(Silent):
    def __init__(self, step: Step) -> None:
        self._step = step

    def begin(self, stage: str) -> None:
        self._step(stage)


class Export(Scenario):
    """An export over a former one. The graphs are not traced but written again, piece by piece."""

    def __init__(self, tiny_folder: Path, bundle: Path) -> None:
        self._loaded, self._source = load_model(resolve_model(str(tiny_folder))), Bundle.load(bundle)
        self._step: Step = lambda event: None
        for name in ("trace_vision", "trace_embedding", "trace_decoder"):
            setattr(exporter, name, self._write)

    def prepare(self, folder: Path) -> None:
        shutil.copytree(self._source.path, folder / "bundle")
        (folder / "bundle" / "mine").touch()  # by which the former one is known

    def run(self, folder: Path, step: Step) -> None:
        self._step = step
        exporter.export_bundle(self._loaded, self._source.plan, folder / "bundle", force=True, progress=_Steps(step))

    def check(self, folder: Path, *, done: bool = False) -> None:
        assert Bundle.load(folder / "bundle").plan == self._source.plan
        assert not done or not (folder / "bundle" / "mine").exists()
        for path in folder.glob(".*.tmp"):  # one that is being written, or the former one while it is deleted
            with suppress(EdgePruneError):
                assert Bundle.load(path).plan == self._source.plan

    def _write(self, *given: Any) -> Any:
        (path,) = (each for each in given if isinstance(each, Path))
        name = path.relative_to(path.parents[1]).as_posix()
        for each in (name, f"{name}.data"):
            data = self._source.file(each).read_bytes()
            with (path.parents[1] / each).open("wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                self._step("write")
                file.write(data[len(data) // 2 :])
        return self._source.manifest.graphs[name]


class Calibrate(Scenario):
    """Statistics of three samples, kept after each, and a plan from them."""

    def __init__(self, tiny_folder: Path) -> None:
        loaded = load_model(resolve_model(str(tiny_folder)))
        self._folder, self._expected = tiny_folder, dict[str, str]()
        vars(collecting)["SAVE_EVERY"] = 1
        vars(commands)["load_model"] = lambda folder, **_: loaded

    def prepare(self, folder: Path) -> None:
        pixels = np.random.default_rng(5).integers(0, 256, (3, 84, 112, 3), dtype=np.uint8)
        lines = []
        for number, each in enumerate(pixels):
            Image.fromarray(each).save(folder / f"{number}.png")
            lines.append(json.dumps({"image": f"{number}.png", "prompt": "What is it?"}))
        (folder / "samples.jsonl").write_text("\n".join(lines))

    def run(self, folder: Path, step: Step) -> None:
        words = ["--method", "plphp", "--budget", "0.5", "--max-tokens", "3", "--image-size", "84x112", "--force", "--json"]
        words += [str(self._folder), "--data", str(folder / "samples.jsonl"), "-o", str(folder / "plan.json")]
        # `invoke` of the group would make an exit code of an error, which is wanted as it is.
        command = command_line.commands["calibrate"]
        command.main(words, standalone_mode=False)

    def check(self, folder: Path, *, done: bool = False) -> None:
        found = {path.name: path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}
        if "plan.json" in found:
            KeepPlan.load(found["plan.json"])
        for path in folder.iterdir():
            if path.suffix == ".safetensors" and not path.name.startswith("."):
                assert Statistics.load(path).samples == 3
            if path.suffix == ".partial":
                assert Statistics.load(path).samples <= 3
        if done:
            content = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}
            self._expected = self._expected or content
            assert content and content == self._expected, "another result than without the fault"
