"""Bundles that are changed on purpose: a weight altered, the manifest made to agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from edgeprune.bundle import MANIFEST, Bundle
from edgeprune.bundle.integrity import record_files
from edgeprune.export.verification import ParityStage


def first_failure(report: list[ParityStage]) -> str | None:
    return next((stage.name for stage in report if not stage.passed), None)


def sealed(folder: Path) -> Bundle:
    """Write the manifest anew, so that the change is a bug in the export and not an altered file."""
    data = json.loads((folder / MANIFEST).read_text())
    data["files"] = {n: {"bytes": r.bytes, "sha256": r.sha256} for n, r in record_files(folder, MANIFEST).items()}
    (folder / MANIFEST).write_text(json.dumps(data))
    return Bundle.load(folder)


def change_weight(folder: Path, graph: str, contains: str, by: float) -> None:
    """Add a number to the weights of some name."""
    model = onnx.load(str(folder / graph))
    found = [tensor for tensor in model.graph.initializer if contains in tensor.name]
    assert found, f"no weight {contains} in {graph}"
    for tensor in found:
        tensor.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(tensor) + np.float32(by)), tensor.name))
    onnx.save_model(model, str(folder / graph))
