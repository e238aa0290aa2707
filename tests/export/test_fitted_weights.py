"""int4 weights that samples decide: the same graph with other numbers, which lose less."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from drawn_samples import samples
from onnx import numpy_helper
from quantized_folders import Scheme, quantize_folder
from repository import ROOT
from tiny_models import TINY_GEOMETRY

import edgeprune.checkpoint.weights
from edgeprune.bundle import DECODER, MANIFEST, Bundle, Manifest
from edgeprune.calibration.data.samples import BadSampleError, WeightSamples
from edgeprune.calibration.replay.layerwise import fitted_int4, named_matrices
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.errors import BundleError, UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.export.verification import verify
from edgeprune.model.gptq import FittedMatrix
from edgeprune.model.quantization import Quantized
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.presets import staircase_plan, unpruned_plan
from edgeprune.targets import TARGETS, Lowering

PLAN = unpruned_plan("qwen2_vl", 2, TINY_GEOMETRY)
PRUNED = staircase_plan(PLAN, "fastv", [0.5], [1]).with_cuts(Cut("cache", "plphp", 2, layer=1))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> WeightSamples:
    return samples(tmp_path_factory.mktemp("fit"), 0)


@pytest.fixture(scope="module", params=["cpu", pytest.param("jetpack6", marks=pytest.mark.slow)])
def lowering(request: pytest.FixtureRequest) -> Lowering:
    return Lowering(TARGETS[request.param], "int4")


@pytest.fixture(scope="module")
def bundle(even: LoadedModel, data: WeightSamples, lowering: Lowering, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(even, PRUNED, tmp_path_factory.mktemp("fitted") / "bundle", lowering=lowering, data=data)


def stored_by(loaded: LoadedModel) -> dict[str, Any]:
    """Return where the weights of the decoder's layers come from."""
    matrices = named_matrices(loaded.family.decoder().layers)
    return {name: getattr(matrix.weight, "stored", None) for name, matrix in matrices.items()}


def decoder(bundle: Bundle) -> tuple[list[tuple[str, list[str]]], dict[str, np.ndarray]]:
    """Return the nodes of the decoder with their inputs, and its initializers."""
    graph = onnx.load(bundle.file(DECODER)).graph
    return [(node.op_type, list(node.input)) for node in graph.node], {
        tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer
    }


def test_the_graph_is_the_same_and_its_numbers_differ(
    bundle: Bundle, even: LoadedModel, lowering: Lowering, tmp_path: Path
) -> None:
    rounded = export_bundle(even, PRUNED, tmp_path / "rounded", lowering=lowering)
    (nodes, numbers), (expected_nodes, expected) = decoder(bundle), decoder(rounded)
    assert nodes == expected_nodes and numbers.keys() == expected.keys()
    assert all(numbers[name].shape == expected[name].shape and numbers[name].dtype == expected[name].dtype for name in numbers)
    other = {name for name in numbers if not np.array_equal(numbers[name], expected[name])}
    integers = {name for name in numbers if name.endswith(".weight.int4")}
    # "restored": query and key of layer 1, which the cut before it multiplies by too
    assert integers <= other and all(name.endswith((".int4", ".scales", ".restored")) for name in other)
    assert len(integers) == (10 if lowering.target.blocked else 14)  # query, key and value are one
    assert rounded.manifest.gptq is None and bundle.manifest.gptq is not None
    assert (bundle.manifest.gptq.samples, len(bundle.manifest.gptq.sha256)) == (6, 64)


def test_it_is_verified(bundle: Bundle, even: LoadedModel) -> None:
    report = {stage.name: stage for stage in verify(bundle, even)}
    assert all(stage.passed for stage in report.values())
    worst = report["weights"].worst
    assert worst is not None and 0.05 < worst < 0.5
    assert not [path for path in bundle.path.rglob("*") if path.name.endswith(".safetensors")]
    assert not any(stored_by(even).values())


def test_verify_notices_weights_of_other_rows(
    even: LoadedModel, data: WeightSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FittedMatrix.quantized

    def turned(matrix: FittedMatrix, start: int, stop: int) -> Quantized:
        found = right(matrix, start, stop)
        return Quantized("int4", found.values.flip(0), found.scales.flip(0))

    monkeypatch.setattr(FittedMatrix, "quantized", turned)
    broken = export_bundle(even, PRUNED, tmp_path / "b", lowering=Lowering(TARGETS["jetpack6"], "int4"), data=data)
    assert [stage.name for stage in verify(broken, even) if not stage.passed] == ["weights"]


def test_products_of_unseen_samples_lose_less(even: LoadedModel, data: WeightSamples, tmp_path: Path) -> None:
    # The example's own figure, on a tiny model.
    measure = runpy.run_path(str(ROOT / "examples" / "quantized" / "errors.py"))["measure"]
    losses = measure(even, PLAN, data, list(samples(tmp_path, 100).samples))
    ratios = [losses["gptq"].products[name] / error for name, error in losses["rounding"].products.items()]
    assert len(ratios) == 14 and max(ratios) < 1.0 and np.mean(ratios) < 0.8
    assert 0 < np.mean(losses["gptq"].nats) < np.mean(losses["rounding"].nats)


def test_matrices_in_their_files_are_fitted_one_layer_at_a_time(
    even: LoadedModel, data: WeightSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgeprune.checkpoint.weights, "LARGE", 64)
    stored = load_model(resolve_model(even.folder.name), on_disk=True)
    most, layers = 0, stored.family.decoder().layers

    def in_memory(_: Any, __: Any) -> None:
        nonlocal most
        most = max(most, sum(any(matrix.weight.stride()) for matrix in named_matrices(layers).values()))

    for layer in layers:
        layer.mlp.register_forward_pre_hook(in_memory)
    lowering, found = Lowering(TARGETS["jetpack6"], "int4"), []
    for number, loaded in enumerate((even, stored)):
        (tmp_path / str(number)).mkdir()
        with fitted_int4(loaded, PLAN, data, lowering, tmp_path / str(number)):
            found.append({name: matrix.quantized(0, 32) for name, matrix in stored_by(loaded).items()})
    assert most == 7  # of 14
    assert all(torch.equal(found[0][name].values, found[1][name].values) for name in found[0])
    assert not any(any(matrix.weight.stride()) for matrix in named_matrices(layers).values())
    assert all(isinstance(source, edgeprune.checkpoint.weights.StoredTensor) for source in stored_by(stored).values())


def test_what_samples_cannot_decide_is_refused(
    even: LoadedModel, tiny: LoadedModel, tiny_plan: KeepPlan, data: WeightSamples, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="the precision is int8"):
        export_bundle(even, PLAN, tmp_path / "b", lowering=Lowering(TARGETS["jetpack6"], "int8"), data=data)
    int4 = Lowering(TARGETS["jetpack6"], "int4")
    with pytest.raises(UsageError, match=r"No matrix of .* blocks of 128"):
        export_bundle(tiny, tiny_plan, tmp_path / "b", lowering=int4, data=data)
    folder = tmp_path / "packed"
    folder.mkdir()
    for file in Path(even.folder.name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    quantize_folder(folder, Scheme(group=128))
    for lowering in (int4, Lowering(TARGETS["jetpack6"], "w8a8")):
        with pytest.raises(UsageError, match="is quantized, and its integers are kept"):
            export_bundle(load_model(resolve_model(str(folder))), PLAN, tmp_path / "b", lowering=lowering, data=data)
    broken = WeightSamples((data.samples[0], samples(tmp_path, 5, 1).samples[0]), "")
    (tmp_path / "5.png").write_bytes(b"no image")
    with pytest.raises(BadSampleError, match=r"5\.jsonl:1"):
        export_bundle(even, PLAN, tmp_path / "b", lowering=int4, data=broken)
    assert not (tmp_path / "b").exists()


def test_manifests_before_gptq_are_read(bundle: Bundle, tmp_path: Path) -> None:
    data = json.loads((bundle.path / MANIFEST).read_text())
    assert Manifest.parse(tmp_path, json.dumps(data).encode()).gptq == bundle.manifest.gptq
    for wrong in (3, {"samples": "6", "sha256": "a"}, {"samples": 6}):
        with pytest.raises(BundleError, match="malformed"):
            Manifest.parse(tmp_path, json.dumps(data | {"gptq": wrong}).encode())
    del data["gptq"]
    assert Manifest.parse(tmp_path, json.dumps(data | {"schema_version": 9}).encode()).gptq is None
