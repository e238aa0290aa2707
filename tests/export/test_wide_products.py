"""Products beyond float16 are found at export and stay in float32, whether or not the weights are in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from plans import PLANS

import edgeprune.checkpoint.weights
from edgeprune.bundle import DECODER, MANIFEST, VISION, Bundle, Manifest
from edgeprune.calibration.replay.products import FLOAT16_MARGIN, largest_products
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.errors import BundleError, VerificationError
from edgeprune.export.checking import check_bundle
from edgeprune.export.exporter import export_bundle
from edgeprune.export.verification import verify
from edgeprune.plan import KeepPlan
from edgeprune.targets import TARGETS, Lowering

HALF = Lowering(TARGETS["jetpack6"], "fp16")
WIDE = {"vision.tower.blocks.1.mlp.fc2", "decoder.layers.1.mlp.down_proj"}


@pytest.fixture(scope="module")
def overflowing(tiny_folder: Path) -> LoadedModel:
    """Return the tiny model, with two matrices whose products exceed float16; norms follow, so the logits stay small."""
    loaded = load_model(resolve_model(str(tiny_folder)))
    with torch.no_grad():
        vision, decoder = loaded.model.model.visual.blocks[1].mlp, loaded.model.model.language_model.layers[1].mlp
        for matrix, factor in ((vision.fc1, 500), (vision.fc2, 1000), (decoder.up_proj, 1000), (decoder.down_proj, 1000)):
            matrix.weight *= factor
    return loaded


@pytest.fixture(scope="module")
def plan() -> KeepPlan:
    return PLANS["input, layers"]


@pytest.fixture(scope="module", params=["fp16", "int8"])
def bundle(
    request: pytest.FixtureRequest, overflowing: LoadedModel, plan: KeepPlan, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    lowering = replace(HALF, precision=request.param)
    return export_bundle(overflowing, plan, tmp_path_factory.mktemp("wide") / "bundle", lowering=lowering)


def test_what_is_large_is_recorded_and_stays_in_float32(bundle: Bundle) -> None:
    record = bundle.manifest.wide_products
    assert record is not None and set(record) == WIDE and min(record.values()) > FLOAT16_MARGIN
    assert set(bundle.manifest.lowering.wide) == WIDE
    for graph, name in ((VISION, "tower.blocks.1.mlp.fc2"), (DECODER, "decoder.layers.1.mlp.down_proj")):
        model = onnx.load(bundle.file(graph), load_external_data=False)
        kinds = {value.name: value.data_type for value in model.graph.initializer}
        if bundle.manifest.precision == "fp16":
            assert kinds[f"{name}.weight"] == onnx.TensorProto.FLOAT
        else:
            assert kinds[f"{name}.weight.scales"] == onnx.TensorProto.FLOAT
        others = [kind for value, kind in kinds.items() if value.endswith((".weight.fp16", ".weight.scales")) and name not in value]
        assert others and set(others) == {onnx.TensorProto.FLOAT16}


def test_it_is_verified(bundle: Bundle, overflowing: LoadedModel) -> None:
    assert [stage for stage in verify(bundle, overflowing) if not stage.passed] == []


def test_check_reads_the_record(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.export.checking.can_try", lambda: False)
    report = check_bundle(bundle, bundle.manifest.lowering.target)
    assert {finding.node for finding in report.findings if "stay in float32" in finding.reason} == WIDE
    older = replace(bundle, manifest=replace(bundle.manifest, wide_products=None))
    (finding,) = check_bundle(older, bundle.manifest.lowering.target).findings
    assert "not measured" in finding.reason and finding.severity == "warning" and report.passed


@pytest.mark.slow
def test_bfloat16_holds_them(overflowing: LoadedModel, plan: KeepPlan, tmp_path: Path) -> None:
    bundle = export_bundle(overflowing, plan, tmp_path / "bundle", lowering=replace(HALF, precision="bf16"))
    assert bundle.manifest.wide_products is None and bundle.manifest.lowering.wide == ()
    for graph in (VISION, DECODER):
        stored = onnx.load(bundle.file(graph), load_external_data=False).graph.initializer
        kinds = {value.data_type for value in stored if ".weight" in value.name and len(value.dims) == 2}
        assert kinds == {onnx.TensorProto.BFLOAT16}
    assert [stage for stage in verify(bundle, overflowing) if not stage.passed] == []


def test_without_the_record_verify_names_what_overflows(
    overflowing: LoadedModel, plan: KeepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.export.exporter.wide_products", lambda *_: {})
    bundle = export_bundle(overflowing, plan, tmp_path / "bundle", lowering=HALF)
    with pytest.raises(VerificationError, match=r"vision\.tower\.blocks\.1\.mlp\.fc2 multiplies .* to [\d,]+, .*65,504.*again"):
        verify(bundle, overflowing)


def test_weights_on_disk_are_measured_as_those_in_memory(
    tiny_folder: Path, tiny: LoadedModel, plan: KeepPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgeprune.checkpoint.weights, "LARGE", 64)
    monkeypatch.setattr("edgeprune.calibration.replay.products._SLICE", 500)  # several slices of a matrix
    stored = load_model(resolve_model(str(tiny_folder)), on_disk=True)
    assert not any(stored.family.decoder().lm_head.weight.stride())
    expected, actual = largest_products(tiny, plan), largest_products(stored, plan)
    assert expected.keys() == actual.keys() and len(expected) > 20
    assert np.allclose([expected[name] for name in expected], [actual[name] for name in expected], rtol=1e-4)
    assert not any(stored.family.decoder().lm_head.weight.stride())  # nothing was kept


def test_only_products_in_float16_are_measured(tiny_bundle: Bundle) -> None:
    assert tiny_bundle.manifest.wide_products is None


def test_manifests_without_the_record_are_read(bundle: Bundle, tmp_path: Path) -> None:
    data = json.loads((bundle.path / MANIFEST).read_text())
    for wrong in ({"a": -1.0}, {"a": "1"}, {"a": float("inf")}, [1], {"a": True}):
        with pytest.raises(BundleError, match="malformed"):
            Manifest.parse(tmp_path, json.dumps(data | {"wide_products": wrong}).encode())
    del data["wide_products"]
    assert Manifest.parse(tmp_path, json.dumps(data | {"schema_version": 8}).encode()).wide_products is None
