"""nvfp4: inputs and weights of the decoder's products in FP4 (E2M1) with FP8 scales, for the GPUs of Thor."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from drawn_samples import samples
from onnx import TensorProto, helper, numpy_helper
from tiny_models import TINY_GEOMETRY, model_folder, qwen2_vl_config

from edgeprune.bundle import DECODER, ROUNDINGS, VISION, Bundle, float32_graph
from edgeprune.calibration.data.samples import WeightSamples
from edgeprune.calibration.replay.ranges import collect_ranges
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.device.onnx_file import read_graph
from edgeprune.errors import UsageError
from edgeprune.export.checking import check_bundle
from edgeprune.export.exporter import export_bundle
from edgeprune.export.passes.emulation import write_emulated
from edgeprune.export.verification import verify
from edgeprune.lint.check import lint
from edgeprune.model import nvfp4
from edgeprune.model.quantization import quantize
from edgeprune.model.smoothquant import load_roundings
from edgeprune.plan import Cut
from edgeprune.plan.presets import staircase_plan, unpruned_plan
from edgeprune.runtime import load
from edgeprune.targets import TARGETS, Lowering

PLAN = unpruned_plan("qwen2_vl", 2, TINY_GEOMETRY)
PRUNED = staircase_plan(PLAN, "fastv", [0.5], [1]).with_cuts(Cut("cache", "plphp", 2, layer=1))
DYNAMIC = "TRT_FP4DynamicQuantize"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> WeightSamples:
    return samples(tmp_path_factory.mktemp("fit"), 0)


@pytest.fixture(scope="module", params=[pytest.param("jetpack7", marks=pytest.mark.slow), "tensorrt11"])
def bundle(
    request: pytest.FixtureRequest, even: LoadedModel, data: WeightSamples, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    folder = tmp_path_factory.mktemp("nvfp4") / "bundle"
    return export_bundle(even, PRUNED, folder, lowering=Lowering(TARGETS[request.param], "nvfp4"), data=data)


def test_it_is_verified_and_answers(bundle: Bundle, even: LoadedModel, tiny_image: Any) -> None:
    assert [stage for stage in verify(bundle, even) if not stage.passed] == []
    assert load(bundle.path).generate(tiny_image, "What?", max_tokens=3).receipt.kv_bytes > 0
    record = bundle.manifest.smoothing
    assert record is not None and (record.rounded, record.lossy, record.left) == (14, {}, ())


def test_products_of_layers_are_fp4_and_all_else_is_float16(bundle: Bundle) -> None:
    target, found = bundle.manifest.lowering.target, load_roundings(bundle.file(ROUNDINGS), "nvfp4")
    graph = onnx.load(bundle.file(DECODER)).graph
    made = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    rounded = set[str]()
    for node in [node for node in graph.node if node.op_type == "MatMul"]:
        casts = [made.get(name) for name in node.input]
        if not all(cast is not None and cast.op_type == "Cast" for cast in casts):
            continue
        state, weight = (made.get(cast.input[0]) for cast in casts)  # type: ignore[union-attr]
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        name = weight.input[0].removesuffix(".weight.nvfp4")
        assert state is not None and state.op_type == "DequantizeLinear"
        quantized, scaled = made[state.input[0]], made[weight.input[1]]
        assert (quantized.op_type, quantized.domain, made[state.input[1]].input[1]) == (DYNAMIC, "trt", quantized.input[1])
        assert numpy_helper.to_array(stored[quantized.input[1]]) == np.float32(found[name].scale)
        assert [stored[tensor].data_type for tensor in (weight.input[0], *scaled.input)] == [
            TensorProto.FLOAT4E2M1,
            TensorProto.FLOAT8E4M3FN,
            TensorProto.FLOAT,
        ]
        rounded.add(name)
    assert rounded == found.keys() and len(rounded) == 14
    assert len([node for node in graph.node if node.op_type == DYNAMIC]) == 8  # query, key and value share one
    assert [tensor.data_type for tensor in graph.initializer if "lm_head.weight" in tensor.name] == [TensorProto.FLOAT16]
    vision = onnx.load(bundle.file(VISION)).graph
    assert {node.op_type for node in vision.node}.isdisjoint({"DequantizeLinear", DYNAMIC})
    for path in (DECODER, VISION):
        assert lint(bundle.file(path), target, modules=["Thor"], name=path) == []
    assert len([shape for shape in read_graph(bundle.file(DECODER)).weights if min(shape) > 1]) == 15  # no scales among them


def test_scales_hold_the_largest_input_of_the_samples(bundle: Bundle, even: LoadedModel, data: WeightSamples) -> None:
    found, (_, ranges) = load_roundings(bundle.file(ROUNDINGS), "nvfp4"), collect_ranges(even, PLAN, data)
    for first, group in ranges.groups.items():
        for name in group:
            assert (name in found) == name.startswith("decoder.layers.")
            if name in found:
                assert found[name].scale * 448 * 6 == pytest.approx(float(ranges.inputs[first].largest.max()), rel=1e-6)


def test_the_graph_for_onnx_runtime_has_no_weights_of_its_own(bundle: Bundle) -> None:
    path = bundle.file(float32_graph(DECODER))
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert [each.domain for each in model.opset_import] == [""]
    assert not {tensor.data_type for tensor in model.graph.initializer} & {TensorProto.FLOAT4E2M1}
    places = [entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    assert set(places) == {"decoder.onnx.data"} and not list(bundle.path.glob("onnx/*.float32.onnx.data"))
    assert float32_graph(VISION) not in bundle.manifest.files


def e2m1(numbers: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = np.clip(numbers, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return rounded


def in_fp4(numbers: np.ndarray, scale: np.float32) -> np.ndarray:
    """Return NVFP4's numbers, by the types of ml_dtypes."""
    blocks = numbers.reshape(-1, 16)
    peaks = np.abs(blocks).max(axis=1, keepdims=True) / (np.float32(6) * scale)
    steps = np.clip(peaks, 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    restored: np.ndarray = (e2m1(blocks / steps) * steps).reshape(numbers.shape)
    return restored


def drawn(*shape: int) -> np.ndarray:
    # Some outliers, a block of zeros, and one that is far below the others.
    numbers = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    numbers[:, 3] *= 100
    numbers[1, 16:32], numbers[2, 16:32] = 0, numbers[2, 16:32] * 1e-9
    return numbers


@pytest.mark.parametrize("width", [32, 64])
def test_onnx_runtime_computes_the_numbers_of_fp4(tmp_path: Path, width: int) -> None:
    # By ml_dtypes, where the pass rounds by arithmetic. The small matrix is stored in the graph, the other beside it.
    state, weight, scale = drawn(5, width), drawn(16, width).T.copy(), np.float32(0.01)
    of_all = np.float32(np.abs(weight).max() / np.float32(6 * 448))
    blocks = weight.T.reshape(16, width // 16, 16)
    scales = np.clip(np.abs(blocks).max(axis=2) / (6 * of_all), 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn)
    values = np.clip(blocks / (scales.astype(np.float32) * of_all)[..., None], -6, 6).reshape(16, width).T
    initializers = [
        numpy_helper.from_array(np.asarray(values, ml_dtypes.float4_e2m1fn), "w"),
        numpy_helper.from_array(np.ascontiguousarray(scales.T), "s"),
        numpy_helper.from_array(of_all, "g"),
        numpy_helper.from_array(scale, "xg"),
    ]
    nodes = [
        helper.make_node(DYNAMIC, ["x", "xg"], ["q", "qs"], domain="trt", axis=-1, block_size=16, scale_type=17),
        helper.make_node("DequantizeLinear", ["qs", "xg"], ["qd"]),
        helper.make_node("DequantizeLinear", ["q", "qd"], ["a"], axis=-1, block_size=16),
        helper.make_node("DequantizeLinear", ["s", "g"], ["sd"]),
        helper.make_node("DequantizeLinear", ["w", "sd"], ["b"], axis=0, block_size=16),
        helper.make_node("Add", ["a", "x"], ["y"]),
        helper.make_node("Identity", ["b"], ["z"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in ("x", "y"))
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, [width, 16])
    q = helper.make_tensor_value_info("q", TensorProto.FLOAT4E2M1, ["n", width])
    graph = helper.make_graph(nodes, "graph", [x], [y, z], initializers, value_info=[q])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
    onnx.save(
        helper.make_model(graph, opset_imports=opsets, ir_version=11),
        tmp_path / "fp4.onnx",
        save_as_external_data=True,
        size_threshold=300,
        location="fp4.data",
    )
    assert write_emulated(tmp_path / "fp4.onnx", tmp_path / "plain.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "plain.onnx"), providers=["CPUExecutionProvider"])
    added, restored = session.run(None, {"x": state})
    np.testing.assert_array_equal(added, in_fp4(state, scale) + state)
    np.testing.assert_array_equal(restored, in_fp4(weight.T.copy(), of_all).T)
    assert not write_emulated(tmp_path / "plain.onnx", tmp_path / "again.onnx") and not (tmp_path / "again.onnx").exists()


def test_weights_are_those_of_modelopt() -> None:
    # NVFP4QTensor.quantize(rows, 16) of nvidia-modelopt 0.47.0: two numbers in a byte, the first in the low bits.
    packed = "ad52c749761b659d63c751d63a768c64ef1de6d547b88b745d6ed1fede615e7d"
    rows = torch.stack([torch.arange(32) * 7 % 32 * 0.37 - 4.1, (torch.arange(32) ** 2 % 23) * 0.011 - 0.09])
    made = quantize(rows, "nvfp4", torch.float16)
    codes = made.values.float().numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8).ravel()
    assert (codes[0::2] | codes[1::2] << 4).tobytes().hex() == packed
    assert made.scales.view(torch.uint8).numpy().tobytes().hex() == "7e7d4d4d"
    assert made.scale == 0.002741815522313118


def test_the_values_of_modelopt_notice_another_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvfp4, "SCALES", (2.0**-9, 256.0))
    with pytest.raises(AssertionError):
        test_weights_are_those_of_modelopt()
    monkeypatch.undo()
    monkeypatch.setattr(nvfp4, "round_to_fp4", lambda numbers: (numbers * 2).round().clamp(-12, 12) / 2)
    with pytest.raises(AssertionError):
        test_weights_are_those_of_modelopt()


def test_numbers_are_those_of_ml_dtypes() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    numbers = torch.cat([ties, -ties, ties * 1.001, ties * 0.999, torch.linspace(-8, 8, 4001)])
    np.testing.assert_array_equal(nvfp4.round_to_fp4(numbers).numpy(), e2m1(numbers.numpy()))
    rows = torch.from_numpy(drawn(7, 96))
    scale = nvfp4.scale_of_all(float(rows.abs().max()))
    np.testing.assert_array_equal(nvfp4.rounded(rows, scale).numpy(), in_fp4(rows.numpy(), np.float32(scale)))
    assert torch.equal(quantize(rows, "nvfp4", torch.float16).restored(), nvfp4.rounded(rows, scale))
    assert torch.equal(nvfp4.rounded(torch.zeros(2, 16), nvfp4.scale_of_all(0.0)), torch.zeros(2, 16))
    # inputs beyond those of the samples are clipped
    assert float(nvfp4.rounded(torch.full((1, 16), 50.0), nvfp4.scale_of_all(5.0)).max()) == pytest.approx(5.0)


def test_a_product_loses_a_seventh_with_outliers_too() -> None:
    # In blocks: 9.5 % by the weights, the same by the inputs, whose outlier spoils the 15 others of its block alone.
    torch.manual_seed(0)
    states, weight = torch.randn(128, 256), torch.randn(64, 256) * 0.05
    for outlier in (1, 100):
        states[:, 3] *= outlier
        exact, scale = states @ weight.T, nvfp4.scale_of_all(float(states.abs().max()))
        product = nvfp4.rounded(states, scale) @ quantize(weight, "nvfp4", torch.float16).restored().T
        assert 0.02 < float((product - exact).norm() / exact.norm()) < 0.15


def test_verify_notices_another_scale(bundle: Bundle, even: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = load_roundings(bundle.file(ROUNDINGS), "nvfp4")
    wrong = {name: replace(each, scale=each.scale / 16) for name, each in right.items()}
    monkeypatch.setattr("edgeprune.export.verification.load_roundings", lambda *_: wrong)
    assert {"prefill", "generation"} <= {stage.name for stage in verify(bundle, even) if not stage.passed}


def test_verify_notices_a_bit_of_a_weight(bundle: Bundle, even: LoadedModel) -> None:
    weight = even.family.decoder().layers[1].mlp.up_proj.weight
    whole = weight.detach().clone()
    with torch.no_grad():
        weight[5, 7] = -weight[5, 7]
    try:
        stages = {stage.name: stage for stage in verify(bundle, even)}
    finally:
        with torch.no_grad():
            weight.copy_(whole)
    assert not stages["weights"].passed and stages["weights"].compared == "14 matrices in FP4"


def test_verify_notices_activations_that_are_not_rounded(
    bundle: Bundle, even: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvfp4, "rounded", lambda numbers, _: numbers)
    assert {"kept", "prefill", "generation"} & {stage.name for stage in verify(bundle, even) if not stage.passed}


def test_the_example_measures_products(even: LoadedModel, data: WeightSamples, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[2] / "examples" / "quantized"
    monkeypatch.syspath_prepend(folder)
    example = runpy.run_path(str(folder / "products.py"))
    unseen = [sample for sample in data.samples if sample.answer][:2]
    found = {way: max(errors.values()) for way, errors in example["measure"](even, PLAN, data, unseen).items()}
    assert 0.01 < found["fp8"] < 0.06 < found["nvfp4, weights alone"] < 0.13 and found["nvfp4"] < 0.25
    assert found["nvfp4, weights alone"] < found["nvfp4"]


@pytest.mark.slow
def test_matrices_without_whole_blocks_are_float16_and_named(
    data: WeightSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    sizes = {"hidden_size": 128, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = qwen2_vl_config({**sizes, "rope_parameters": rope})
    (tmp_path / "odd").mkdir()
    model = load_model(resolve_model(str(model_folder(tmp_path / "odd", Qwen2VLForConditionalGeneration, config))))
    lowering = Lowering(TARGETS["tensorrt11"], "nvfp4")
    made = export_bundle(model, PLAN, tmp_path / "bundle", lowering=lowering, data=data)
    left = tuple(f"decoder.layers.{layer}.mlp.down_proj" for layer in (0, 1))
    assert made.manifest.smoothing is not None and made.manifest.smoothing.left == left
    assert Bundle.load(made.path).manifest == made.manifest
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(made.file(DECODER)).graph.initializer}
    assert [kinds[f"{name}.weight.fp16"] for name in left] == [TensorProto.FLOAT16] * 2
    assert [stage for stage in verify(made, model) if not stage.passed] == []
    assert check_bundle(made, TARGETS["tensorrt11"]).passed
    monkeypatch.setattr("edgeprune.calibration.replay.layerwise.BLOCKS", {"nvfp4": 80})
    with pytest.raises(UsageError, match=r"No matrix of .* divides into blocks of 80 .*in fp16") as raised:
        export_bundle(model, PLAN, tmp_path / "other", lowering=lowering, data=data)
    assert "--precision fp8" in str(raised.value.hint)


@pytest.mark.slow
def test_products_that_float16_does_not_hold_are_float32_behind_fp4(
    even: LoadedModel, data: WeightSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = "decoder.layers.0.mlp.gate_proj"  # up_proj multiplies the same states
    monkeypatch.setattr("edgeprune.export.exporter.wide_products", lambda *_: {wide: 40000.0})
    made = export_bundle(even, PLAN, tmp_path / "bundle", lowering=Lowering(TARGETS["jetpack7"], "nvfp4"), data=data)
    graph = onnx.load(made.file(DECODER)).graph
    readers = {name: node for node in graph.node for name in node.input}
    weights = {node.input[0]: readers[node.output[0]].op_type for node in graph.node if node.input[0].endswith("weight.nvfp4")}
    assert weights[f"{wide}.weight.nvfp4"] == "MatMul" and list(weights.values()).count("Cast") == len(weights) - 1 == 13
    assert [stage for stage in verify(made, even) if not stage.passed] == []
    assert check_bundle(made, TARGETS["jetpack7"]).passed


def test_only_targets_with_a_thor_have_it(even: LoadedModel, tmp_path: Path) -> None:
    able = [name for name, target in TARGETS.items() if target.has_small_floats]
    for name in TARGETS.keys() - set(able):
        with pytest.raises(UsageError, match=r"has no nvfp4: .*products of FP4") as raised:
            Lowering(TARGETS[name], "nvfp4")
        assert "--precision int4" in str(raised.value.hint) and "jetpack7, jetpack7.2, tensorrt11" in str(raised.value.hint)
    with pytest.raises(UsageError, match=r"nvfp4 rounds activations to 4 bits .* none are given") as raised:
        export_bundle(even, PLAN, tmp_path / "b", lowering=Lowering(TARGETS["jetpack7"], "nvfp4"))
    assert "--precision int4" in str(raised.value.hint)


def test_graphs_for_orin_and_thor_are_told_what_orin_lacks(bundle: Bundle) -> None:
    found = lint(bundle.file(DECODER), TARGETS["jetpack7.2"])
    assert {finding.severity for finding in found} == {"warning"}
    assert sorted(finding.reason for finding in found) == [
        "Orin cannot compute with FLOAT4E2M1.",
        "Orin cannot compute with FLOAT8E4M3FN.",
    ]
    parsed = [finding for finding in lint(bundle.file(DECODER), TARGETS["jetpack6"]) if finding.severity == "error"]
    assert any(f"TensorRT parses trt::{DYNAMIC} since 10.8" in finding.reason for finding in parsed)
