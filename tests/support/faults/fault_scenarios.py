"""What is interrupted, with what is true of its folder at any time: merge, build and sign here, what needs torch beside it."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.bundle import PLAN, Bundle
from edgeprune.bundle.signing import SIGNATURE, make_key, sign_manifest
from edgeprune.calibration.data.statistics import Statistics, StatisticsSource, merge_files
from edgeprune.device.machine import read_machine
from edgeprune.runtime.backends.tensorrt import build as jobs
from edgeprune.runtime.backends.tensorrt.bindings import DeviceIdentity
from edgeprune.runtime.backends.tensorrt.build import BuildRequest, build_bundle
from edgeprune.runtime.backends.tensorrt.builder import BuilderSettings, Built
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits
from edgeprune.runtime.backends.tensorrt.store import FOLDER, Store

Step = Callable[[str], None]
SECRET, ORIN = b"a device's own key, 32 bytes long", DeviceIdentity("10.3.0", "8.7")


class Scenario(ABC):
    """One command in a folder of its own."""

    @abstractmethod
    def prepare(self, folder: Path) -> None:
        """Put there what is there before the command."""

    @abstractmethod
    def run(self, folder: Path, step: Step) -> None:
        """Run the command; `step` is called where nothing else tells of one."""

    @abstractmethod
    def check(self, folder: Path, *, done: bool = False) -> None:
        """Raise an error unless all that would be accepted is whole; `done`: and it is what the command makes."""


class Merge(Scenario):
    """Two shards added, over a former sum."""

    def __init__(self, tiny_folder: Path, bundle: Path) -> None:
        plan = Bundle.load(bundle).plan
        source = StatisticsSource(plan.family, plan.layers, 2, "ab" * 32, plan.geometry, "last", "mean", False)
        one = Statistics.empty(source).with_sample({name: np.ones(shape) for name, shape in source.shapes().items()})
        self._parts = {"a": one, "b": one + one, "sum": one}

    def prepare(self, folder: Path) -> None:
        for name, statistics in self._parts.items():
            statistics.save(folder / name)

    def run(self, folder: Path, step: Step) -> None:
        merge_files([folder / "a", folder / "b"], folder / "sum")

    def check(self, folder: Path, *, done: bool = False) -> None:
        assert Statistics.load(folder / "sum").samples in ({3} if done else {1, 3})


class Build(Scenario):
    """The engines of a bundle, by a builder that is made up."""

    def __init__(self, tiny_folder: Path, bundle: Path) -> None:
        self._source = bundle

    def prepare(self, folder: Path) -> None:
        shutil.copytree(self._source, folder / "bundle")
        (folder / "bundle" / FOLDER).mkdir()

    def run(self, folder: Path, step: Step) -> None:
        def build_engine(trt: Any, graph: Path, *_: Any, **given: Any) -> Built:
            given["advance"]("building", 0.5)
            return Built(memoryview(graph.name.encode() * 99), 0.0, 0.0, given["timings"] + b"timed")

        vars(jobs)["build_engine"] = build_engine  # this process is given up afterwards
        os.environ["XDG_DATA_HOME"] = str(folder / "data")
        request = BuildRequest(Bundle.load(folder / "bundle"), ProfileLimits(context=64, turn=32), BuilderSettings())
        given: dict[str, Any] = {"trt": object(), "device": ORIN, "secret": SECRET, "machine": read_machine()}
        build_bundle(request, lambda graph, phase, done: step("advance"), **given)

    def check(self, folder: Path, *, done: bool = False) -> None:
        bundle = Bundle.load(folder / "bundle")
        store = Store(bundle.path, SECRET)
        records = store.records()
        for record in records:
            with store.mapped(record) as plan:
                assert plan[:] == Path(record.graph).name.encode() * 99
        assert not done or {record.graph for record in records} == set(bundle.manifest.graphs)


class Sign(Scenario):
    """A key and a signature."""

    def __init__(self, tiny_folder: Path, bundle: Path) -> None:
        self._source = bundle

    def prepare(self, folder: Path) -> None:
        shutil.copytree(self._source, folder / "bundle")
        make_key(folder / "key.pem")

    def run(self, folder: Path, step: Step) -> None:
        sign_manifest(folder / "bundle", folder / "key.pem", force=True)

    def check(self, folder: Path, *, done: bool = False) -> None:
        asked = [folder / "key.pub"] if done or (folder / "bundle" / SIGNATURE).exists() else []
        assert Bundle.load(folder / "bundle", require_signature=asked)
        assert (folder / "bundle" / PLAN).is_file()


def scenario(name: str, model: Path, bundle: Path) -> Scenario:
    """Return a scenario by its name, with the tiny model and its bundle."""
    light: dict[str, Callable[[Path, Path], Scenario]] = {"merge": Merge, "build": Build, "sign": Sign}
    if name in light:
        return light[name](model, bundle)
    from fault_scenarios_torch import Calibrate, Export

    return Calibrate(model) if name == "calibrate" else Export(model, bundle)
