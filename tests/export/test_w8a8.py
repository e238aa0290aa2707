"""w8a8: inputs and weights of products in 8 bits, by scales that samples decide."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from drawn_samples import samples
from onnx import numpy_helper
from repository import ROOT
from tiny_models import TINY_GEOMETRY

import edgeprune.checkpoint.weights
from edgeprune.bundle import DECODER, MANIFEST, ROUNDINGS, VISION, Bundle, Manifest
from edgeprune.calibration.data.samples import WeightSamples
from edgeprune.calibration.replay import ranges
from edgeprune.calibration.replay.ranges import input_roundings
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.errors import BundleError, UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.export.passes.smoothing import smooth_products
from edgeprune.export.passes.weights import SmoothedMatrix, matrix_of
from edgeprune.export.verification import verify
from edgeprune.lint.check import lint
from edgeprune.model.smoothquant import Rounding, load_roundings
from edgeprune.plan import Cut
from edgeprune.plan.presets import staircase_plan, unpruned_plan
from edgeprune.runtime import load
from edgeprune.targets import TARGETS, Lowering

PLAN = unpruned_plan("qwen2_vl", 2, TINY_GEOMETRY)
PRUNED = staircase_plan(PLAN, "fastv", [0.5], [1]).with_cuts(Cut("cache", "plphp", 2, layer=1))
DOWN, OUT = "decoder.layers.1.mlp.down_proj", "decoder.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> WeightSamples:
    return samples(tmp_path_factory.mktemp("fit"), 0)


@pytest.fixture(scope="module")
def outlying(even: LoadedModel) -> Iterator[LoadedModel]:
    """Yield the model with outliers: a channel that norms make 30 times larger, and one that gates do."""
    layers: Any = even.family.decoder().layers
    changed = list[torch.Tensor]()
    with torch.no_grad():
        for layer in layers:
            for weight in (layer.input_layernorm.weight, layer.mlp.up_proj.weight):
                changed += [weight, weight.clone()]
                weight[3] *= 30
    yield even
    with torch.no_grad():
        for weight, before in zip(changed[::2], changed[1::2], strict=True):
            weight.copy_(before)


@pytest.fixture(scope="module", params=["jetpack6", "jetpack7.2"])
def bundle(
    request: pytest.FixtureRequest, outlying: LoadedModel, data: WeightSamples, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    folder = tmp_path_factory.mktemp("w8a8") / "bundle"
    return export_bundle(outlying, PRUNED, folder, lowering=Lowering(TARGETS[request.param], "w8a8"), data=data)


def test_it_is_verified_and_answers(bundle: Bundle, outlying: LoadedModel, tiny_image: Any) -> None:
    assert [stage for stage in verify(bundle, outlying) if not stage.passed] == []
    assert load(bundle.path).generate(tiny_image, "What?", max_tokens=3).receipt.kv_bytes > 0


def test_what_is_rounded_and_what_is_not(bundle: Bundle) -> None:
    record, found = bundle.manifest.smoothing, load_roundings(bundle.file(ROUNDINGS))
    assert record is not None and (record.samples, len(record.sha256), record.rounded) == (6, 64, len(found))
    assert record.lossy == {} and "decoder.lm_head" not in found
    rounded = set[str]()
    for graph, part in ((DECODER, ""), (VISION, "vision.")):
        rounded |= {f"{part}{name}" for name in rounded_in(bundle.file(graph), part, found)}
        assert lint(bundle.file(graph), bundle.manifest.lowering.target, name=graph) == []
    # all that a sample went through
    assert rounded == found.keys() and "vision.patch" in rounded and len([name for name in rounded if "layers" in name]) == 14


def rounded_in(path: Path, part: str, found: dict[str, Rounding]) -> Iterator[str]:
    """Yield the matrices whose inputs are rounded; their scales are those that were found."""
    graph = onnx.load(path).graph
    made = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "MatMul"]:
        state, weight = (made.get(name) for name in node.input)
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        name = weight.input[0].removesuffix(".weight.int8")
        if "lm_head" in name:
            assert state is not None and state.op_type == "Cast"
            continue
        assert state is not None and state.op_type == "DequantizeLinear"
        quantize = made[state.input[0]]
        assert quantize.op_type == "QuantizeLinear" and stored[quantize.input[2]].dtype == np.int8
        assert stored[quantize.input[1]] == stored[state.input[1]] == found[f"{part}{name}"].scale
        assert stored[state.input[1]].dtype == np.float16 and stored[weight.input[1]].dtype == np.float16
        yield name


def test_norms_divide_and_other_inputs_have_a_node(bundle: Bundle, outlying: LoadedModel) -> None:
    found = load_roundings(bundle.file(ROUNDINGS))
    first = found["decoder.layers.0.self_attn.q_proj"]
    assert torch.equal(first.factors, found["decoder.layers.0.self_attn.v_proj"].factors)
    assert float(first.factors[3]) > 3 * float(first.factors.median())
    assert float(found[DOWN].factors[3]) > 3 * float(found[DOWN].factors.median())
    graph = onnx.load(bundle.file(DECODER)).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    (name,) = (each for each in stored if each.startswith("decoder.layers.0.input_layernorm.weight.of."))
    layer: Any = outlying.family.decoder().layers[0]
    weight = layer.input_layernorm.weight.detach().numpy()
    np.testing.assert_allclose(stored[name], weight / first.factors.numpy(), rtol=1e-6)
    nodes = [each for each in stored if each.endswith(".reciprocals")]
    assert any(f"{DOWN}.weight" in each for each in nodes)
    assert not any("q_proj" in each or "gate_proj" in each for each in nodes)


def test_a_lossy_input_stays_float16(
    outlying: LoadedModel, data: WeightSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_of_them = input_roundings(outlying, PLAN, data)
    assert all_of_them.lossy == {}
    monkeypatch.setattr(ranges, "LOSSY", 0.001)
    none = input_roundings(outlying, PLAN, data)
    assert none.found == {} and none.lossy.keys() == all_of_them.found.keys() and min(none.lossy.values()) > 0.001
    monkeypatch.undo()
    monkeypatch.setattr(ranges, "LOSSY", sorted(none.lossy.values())[-1] * 0.999)
    lowering = Lowering(TARGETS["jetpack6"], "w8a8")
    bundle = export_bundle(outlying, PLAN, tmp_path / "bundle", lowering=lowering, data=data)
    assert bundle.manifest.smoothing is not None and 1 <= len(bundle.manifest.smoothing.lossy) < 10
    assert [stage for stage in verify(bundle, outlying) if not stage.passed] == []


def test_verify_notices_another_scale(bundle: Bundle, outlying: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = load_roundings(bundle.file(ROUNDINGS))
    wrong = {
        name: replace(each, factors=each.factors.flip(0)) if name == OUT else replace(each, scale=each.scale * 16)
        for name, each in right.items()
    }
    monkeypatch.setattr("edgeprune.export.verification.load_roundings", lambda *_: wrong)
    failed = {stage.name for stage in verify(bundle, outlying) if not stage.passed}
    assert {"vision", "prefill", "generation"} <= failed


def test_matrices_in_their_files_have_the_same_scales(
    even: LoadedModel, data: WeightSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgeprune.checkpoint.weights, "LARGE", 64)
    stored = load_model(resolve_model(even.folder.name), on_disk=True)
    expected, actual = (input_roundings(each, PLAN, data) for each in (load_model(resolve_model(even.folder.name)), stored))
    assert expected.found.keys() == actual.found.keys()
    for name, each in expected.found.items():
        torch.testing.assert_close(actual.found[name].factors, each.factors, rtol=1e-3, atol=1e-6)


def test_the_example_measures_what_smoothing_takes_away(outlying: LoadedModel, data: WeightSamples) -> None:
    found = runpy.run_path(str(ROOT / "examples" / "quantized" / "activations.py"))["measure"](outlying, PLAN, data)
    assert {"decoder, norms", "decoder, o_proj", "decoder, down_proj", "vision, norms"} <= found.keys()
    assert all(0 < smoothed <= plain < 1 for plain, smoothed in found.values())
    assert all(found[kind][1] < 0.7 * found[kind][0] for kind in ("decoder, norms", "decoder, down_proj"))


def test_what_has_no_samples_is_refused(even: LoadedModel, data: WeightSamples, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none are given"):
        export_bundle(even, PLAN, tmp_path / "b", lowering=Lowering(TARGETS["jetpack6"], "w8a8"))
    with pytest.raises(UsageError, match="has no w8a8"):
        Lowering(TARGETS["onnxruntime"], "w8a8")
    assert not (tmp_path / "b").exists()


def test_manifests_before_w8a8_are_read(bundle: Bundle, tmp_path: Path) -> None:
    data = json.loads((bundle.path / MANIFEST).read_text())
    assert Manifest.parse(tmp_path, json.dumps(data).encode()).smoothing == bundle.manifest.smoothing
    for wrong in (3, {"samples": 6}, data["smoothing"] | {"lossy": {"a": "b"}}):
        with pytest.raises(BundleError, match="malformed"):
            Manifest.parse(tmp_path, json.dumps(data | {"smoothing": wrong}).encode())
    del data["smoothing"]
    assert Manifest.parse(tmp_path, json.dumps(data | {"schema_version": 12}).encode()).smoothing is None


def gemm(name: str, state: ir.Value) -> ir.Node:
    numbers = np.ones((2, 4), np.float32)
    weight = ir.Value(name=f"{name}.weight", const_value=ir.tensor(numbers, name=f"{name}.weight"))
    return ir.node("Gemm", [state, weight], {"transB": 1}, name=name)


@pytest.mark.parametrize("case", ["alone", "also read", "unlike"])
def test_a_norm_that_others_read_is_not_divided(case: str) -> None:
    state = ir.Value(name="x", shape=ir.Shape([3, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    weight, bias = (ir.Value(name=name, const_value=ir.tensor(np.full(4, 6, np.float32), name=name)) for name in ("w", "b"))
    norm = ir.node("LayerNormalization", [state, weight, bias], name="norm")
    (normed,) = norm.outputs
    normed.name, normed.dtype, normed.shape = "normed", ir.DataType.FLOAT, state.shape
    halves, thirds = Rounding(torch.full((4,), 2.0), 1.0), Rounding(torch.full((4,), 3.0), 1.0)
    roundings = {"a": halves, "b": thirds if case == "unlike" else halves}
    nodes = [gemm(name, normed) for name in roundings]
    if case == "also read":
        nodes.append(ir.node("Relu", [normed]))
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([state], outputs, nodes=[norm, *nodes], initializers=[weight, bias], opset_imports={"": 20})
    smooth_products(graph, Lowering(TARGETS["jetpack6"], "w8a8", roundings=roundings), "layers")
    smoothed = matrix_of(nodes[0].inputs[1])  # type: ignore[arg-type]
    assert isinstance(smoothed, SmoothedMatrix) and smoothed.rows(0, 2).tolist() == [[2.0] * 4] * 2
    added = [node for node in graph if node.op_type == "Mul"]
    if case == "alone":
        assert added == [] and all(value.const_value.numpy().tolist() == [3.0] * 4 for value in norm.inputs[1:])  # type: ignore[union-attr]
        return
    assert list(norm.inputs[1:]) == [weight, bias] and len(added) == (2 if case == "unlike" else 1)
    divisors = [1 / node.inputs[0].producer().inputs[1].const_value.numpy()[0] for node in nodes[:2]]  # type: ignore[union-attr]
    assert divisors == pytest.approx([2.0, 3.0 if case == "unlike" else 2.0])
