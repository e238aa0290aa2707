"""The lint's rules on element types and quantization, on tiny graphs that break one each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from edgeprune.lint.check import lint
from edgeprune.lint.graph import load_graph
from edgeprune.lint.rule import Finding
from edgeprune.lint.values import constant
from edgeprune.runtime.backends.tensorrt.trial import try_build
from edgeprune.targets import TARGETS


def findings_of(folder: Path, text: str, target: str = "jetpack6", opset: int = 20) -> list[Finding]:
    onnx.save(parser.parse_model(f'<ir_version: 9, opset_import: ["": {opset}]>\n{text}'), str(folder / "graph.onnx"))
    return lint(folder / "graph.onnx", TARGETS[target])


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def weights(
    folder: Path,
    element: int,
    *,
    rows: int = 128,
    block: int = 32,
    zero: int | None = None,
    stored: bool = True,
    opset: int = 21,
) -> Path:
    # x [2, rows] times weights [rows, 8] that are dequantized in blocks along the rows.
    scales = [-(-rows // block), 8]
    initializers = [numpy_helper.from_array(np.full(scales, 0.5, np.float32), "scale")]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, rows])]
    if stored:
        initializers.append(helper.make_tensor("weight", element, [rows, 8], [1] * (rows * 8)))
    else:
        inputs.append(helper.make_tensor_value_info("weight", element, [rows, 8]))
    given = ["weight", "scale"]
    if zero is not None:
        initializers.append(helper.make_tensor("zero", element, scales, [zero] * int(np.prod(scales))))
        given.append("zero")
    nodes = [
        helper.make_node("DequantizeLinear", given, ["wide"], name="unpack", axis=0, block_size=block),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    return save(folder, nodes, inputs, initializers, opset)


def save(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto],
    opset: int,
) -> Path:
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8])
    graph = helper.make_graph(list(nodes), "graph", list(inputs), [output], list(initializers))
    path = folder / "graph.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11), str(path))
    return path


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_int4_weights_in_blocks_pass(tmp_path: Path, block: int) -> None:
    assert lint(weights(tmp_path, TensorProto.INT4, block=block, zero=0), TARGETS["jetpack6"]) == []


@pytest.mark.parametrize(
    ("options", "reason", "remedy"),
    [
        ({"zero": 1}, "zero point zero is not 0", "symmetrically"),
        ({"block": 256, "rows": 256}, "blocks of 16, 32, 64, 128, this node has 256", "Quantize in blocks of 16"),
        ({"block": 64, "rows": 96}, "Blocks of 64 do not divide the 96 elements", "divides the axis"),
    ],
)
def test_int4_weights_that_do_not_fit(tmp_path: Path, options: dict[str, int], reason: str, remedy: str) -> None:
    found = only(lint(weights(tmp_path, TensorProto.INT4, **options), TARGETS["jetpack6"]))  # type: ignore[arg-type]
    assert (found.node, found.operator, found.severity) == ("unpack", "DequantizeLinear", "error")
    assert reason in found.reason and remedy in found.remedy


def test_int4_that_is_not_stored(tmp_path: Path) -> None:
    found = lint(weights(tmp_path, TensorProto.INT4, stored=False), TARGETS["jetpack7"])
    assert ["for weights alone" in finding.reason for finding in found] == [True, False]
    assert "border of the network" in found[1].reason


def test_unsigned_quantization(tmp_path: Path) -> None:
    found = only(lint(weights(tmp_path, TensorProto.UINT8, zero=0), TARGETS["jetpack7"]))
    assert "DequantizeLinear of UINT8" in found.reason and "INT8 with a zero point of 0" in found.remedy
    small = lint(weights(tmp_path, TensorProto.UINT4, zero=0), TARGETS["jetpack7"])
    assert {finding.node for finding in small} == {"weight", "zero"}
    assert all("UINT4, which TensorRT does not have" in finding.reason and "INT4" in finding.remedy for finding in small)
    assert lint(weights(tmp_path, TensorProto.UINT4, zero=0), TARGETS["onnxruntime"]) == []


@pytest.mark.parametrize(("zero", "passes"), [(0, True), (3, False)])
def test_zero_points_in_external_data_and_behind_casts(tmp_path: Path, zero: int, passes: bool) -> None:
    initializers = [
        numpy_helper.from_array(np.full((300,), 0.5, np.float32), "scale"),
        numpy_helper.from_array(np.full((300,), zero, np.int32), "wide_zero"),
        numpy_helper.from_array(np.ones((300, 8), np.int8), "weight"),
    ]
    nodes = [
        helper.make_node("Cast", ["wide_zero"], ["zero"], to=TensorProto.INT8),
        helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["wide"], name="unpack", axis=0),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    path = save(tmp_path, nodes, [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 300])], initializers, 20)
    onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, location="graph.data", size_threshold=100)
    assert load_graph(path).main.initializers["wide_zero"].data_location == TensorProto.EXTERNAL
    found = lint(path, TARGETS["jetpack6"])
    assert (found == []) == passes
    (tmp_path / "graph.data").unlink()
    assert lint(path, TARGETS["jetpack6"]) == []  # what cannot be read is not judged


def test_small_floats_need_their_jetson(tmp_path: Path) -> None:
    path = weights(tmp_path, TensorProto.FLOAT8E4M3FN)
    orin, opset = lint(path, TARGETS["jetpack6"])
    assert (orin.node, orin.severity) == ("unpack", "error") and "Orin cannot compute with FLOAT8E4M3FN" in orin.reason
    assert (opset.operator, opset.severity) == ("", "warning")
    assert lint(path, TARGETS["jetpack7"]) == []
    assert only(lint(path, TARGETS["jetpack7.2"])).severity == "warning"
    assert only(lint(path, TARGETS["jetpack7.2"], modules=["Orin"])).severity == "error"
    assert lint(path, TARGETS["jetpack7.2"], modules=["Thor"]) == []


def activations(folder: Path, *, width: int = 64, block: int = 16, stored: bool = True, dynamic: bool = True) -> Path:
    # x [2, width] in FP4, by TensorRT's own operator or with a stored scale, times weights [width, 8].
    initializers = [numpy_helper.from_array(np.ones((width, 8), np.float32), "weight")]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, width])]
    if stored:
        initializers.append(numpy_helper.from_array(np.array(0.5, np.float32), "scale"))
    else:
        inputs.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, []))
    settings: dict[str, Any] = {"axis": -1, "block_size": block}
    nodes = [
        helper.make_node(
            "TRT_FP4DynamicQuantize",
            ["x", "scale"],
            ["q", "s"],
            "pack",
            domain="trt",
            scale_type=TensorProto.FLOAT8E4M3FN,
            **settings,
        ),
        helper.make_node("DequantizeLinear", ["s", "scale"], ["wide"]),
        helper.make_node("DequantizeLinear", ["q", "wide"], ["d"], **settings),
        helper.make_node("MatMul", ["d", "weight"], ["y"]),
    ]
    path = save(folder, nodes, inputs, initializers, 21)
    model = onnx.load(str(path))
    model.opset_import.append(helper.make_opsetid("trt", 1))
    model.graph.value_info.append(helper.make_tensor_value_info("q", TensorProto.FLOAT4E2M1, [2, width]))
    onnx.save(model, str(path))
    return path


def test_activations_in_fp4_pass(tmp_path: Path) -> None:
    assert lint(activations(tmp_path), TARGETS["jetpack7"]) == []
    found = lint(activations(tmp_path), TARGETS["jetpack6"])
    assert any("parses trt::TRT_FP4DynamicQuantize since 10.8" in finding.reason for finding in found)
    assert any("Orin cannot compute with FLOAT4E2M1" in finding.reason for finding in found)


FP4_MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "block": ({"block": 32}, "blocks of 16, this node has 32", "in blocks of 16"),
    "length": ({"width": 40}, "do not divide the 40 elements of axis -1", "in FP16"),
    "computed scale": ({"stored": False}, "The scale scale is computed", "that samples give"),
}


@pytest.mark.parametrize("case", FP4_MISTAKES)
def test_activations_in_fp4_that_tensorrt_refuses(tmp_path: Path, case: str) -> None:
    options, reason, remedy = FP4_MISTAKES[case]
    found = only(lint(activations(tmp_path, **options), TARGETS["jetpack7"]))
    assert (found.node, found.severity) == ("pack", "error") and reason in found.reason and remedy in found.remedy


@pytest.mark.parametrize("case", ["", *FP4_MISTAKES])
def test_the_parser_refuses_the_same_activations_in_fp4(tmp_path: Path, case: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = FP4_MISTAKES[case][0] if case else {}
    trial = try_build(activations(tmp_path, **options), "graph", [{}], "SM120")
    assert bool(trial.error) == bool(case), trial.error


@pytest.mark.parametrize("element", [TensorProto.INT8, TensorProto.INT4])
@pytest.mark.parametrize(
    ("scale", "reason"), [(0.0, "1 of 8 scales in scale are 0 or less"), (np.inf, "no numbers"), (np.nan, "no")]
)
def test_scales_that_are_zero_or_no_numbers(tmp_path: Path, element: int, scale: float, reason: str) -> None:
    path = weights(tmp_path, element, block=128)
    assert lint(path, TARGETS["jetpack7.2"]) == []
    model = onnx.load(str(path))
    (scales,) = (tensor for tensor in model.graph.initializer if tensor.name == "scale")
    numbers = numpy_helper.to_array(scales).copy()
    numbers[0, 3] = scale
    scales.CopyFrom(numpy_helper.from_array(numbers.astype(np.float16).astype(np.float32), "scale"))
    onnx.save(model, str(path))
    found = only(lint(path, TARGETS["jetpack7.2"]))
    assert (found.node, found.severity) == ("unpack", "error") and reason in found.reason
    # ONNX Runtime multiplies by 0, which is what a block of zeros needs.
    assert [finding.severity for finding in lint(path, TARGETS["onnxruntime"])] == ["error"] * (scale != 0)


def test_quantizing_divides_by_the_scale(tmp_path: Path) -> None:
    text = "agraph (float[4] x) => (int8[4] y) { s = Constant<value = float {0.0}>() y = QuantizeLinear(x, s, z) }"
    text = text.replace("{ s", "{ z = Constant<value = int8 {0}>() s")
    assert "1 of 1 scales in s are 0 or less" in only(findings_of(tmp_path, text, "onnxruntime")).reason


def test_quantized_activations_may_be_moved_and_not_computed_with(tmp_path: Path) -> None:
    text = (
        "agraph (float[4,4] x) => (float[4,4] y) { s = Constant<value = float {0.5}>() z = Constant<value = int8 {0}>() "
        "q = QuantizeLinear(x, s, z) [move] t = Transpose(q) y = DequantizeLinear(t, s, z) }"
    )
    assert findings_of(tmp_path, text) == []
    assert "INT8" in only(findings_of(tmp_path, text.replace("Transpose(q)", "Sign(q)"))).reason
    computed = text.replace("z = Constant<value = int8 {0}>()", "").replace("x)", "x, int8 z)", 1)
    assert "zero point z is computed" in findings_of(tmp_path, computed)[0].reason


def test_types_that_tensorrt_lacks(tmp_path: Path) -> None:
    text = "agraph (float[4] x) => (float[4] y) { [narrow] s = Cast<to = 5>(x) y = Cast<to = 1>(s) }"
    found = only(findings_of(tmp_path, text))
    assert found.node == "narrow" and "s is of INT16" in found.reason and "INT32" in found.remedy


def test_doubles_are_warned_of_where_they_begin(tmp_path: Path) -> None:
    text = "agraph (float[4] x) => (float[4] y) { [widen] d = Cast<to = 11>(x) e = Abs(d) f = Neg(e) y = Cast<to = 1>(f) }"
    found = only(findings_of(tmp_path, text))
    assert (found.node, found.severity) == ("widen", "warning") and "float64 as float32" in found.reason
    assert findings_of(tmp_path, text.replace("to = 11", "to = 16")) == []  # bfloat16


def test_bytes_at_the_border_alone(tmp_path: Path) -> None:
    assert findings_of(tmp_path, "agraph (uint8[4] x) => (float[4] y) { y = Cast<to = 1>(x) }") == []
    assert findings_of(tmp_path, "agraph (float[4] x) => (uint8[4] y) { y = Cast<to = 2>(x) }") == []
    inside = "agraph (uint8[4] x) => (float[4] y) { [flip] f = Transpose(x) y = Cast<to = 1>(f) }"
    found = only(findings_of(tmp_path, inside))
    assert found.node == "flip" and "computes on UINT8 (x)" in found.reason and "INT32" in found.remedy
    made = "agraph (float[4] x) => (float[4] y) { [narrow] f = Cast<to = 2>(x) y = Cast<to = 1>(f) }"
    assert "becomes UINT8 inside" in only(findings_of(tmp_path, made)).reason


@pytest.mark.parametrize("target", ["jetpack6", "onnxruntime"])
@pytest.mark.parametrize(("operator", "axis"), [("Concat", "<axis = 0>"), ("Add", ""), ("Mul", "")])
def test_mixed_integers(tmp_path: Path, operator: str, axis: str, target: str) -> None:
    text = f"agraph (int64[4] a, int32[4] b) => (int64[n] y) {{ [mix] y = {operator}{axis}(a, b) }}"
    found = only([finding for finding in findings_of(tmp_path, text, target) if finding.node == "mix"])
    assert f"{operator} is given INT32 and INT64" in found.reason and "INT64" in found.remedy
    assert findings_of(tmp_path, text.replace("int32", "int64"), target) == []


def test_mixed_choices(tmp_path: Path) -> None:
    text = "agraph (bool[4] c, float[4] a, float16[4] b) => (float[4] y) { [mix] y = Where(c, a, b) }"
    assert "FLOAT and FLOAT16" in only([finding for finding in findings_of(tmp_path, text) if finding.node == "mix"]).reason


def test_constants_are_folded(tmp_path: Path) -> None:
    text = (
        "agraph (float[4] x) => (int64[2] y) { a = Constant<value = float {3.0}>() b = Cast<to = 7>(a) "
        "z = Constant<value = int64[1] {0}>() c = Unsqueeze(b, z) d = Identity(z) e = Concat<axis = 0>(c, d) "
        "s = Shape(x) y = Add(e, s) }"
    )
    findings_of(tmp_path, text)
    scope = load_graph(tmp_path / "graph.onnx").main
    assert constant(scope, "e") is not None and np.array_equal(constant(scope, "e"), [3, 0])  # type: ignore[arg-type]
    assert constant(scope, "s") is None and constant(scope, "x") is None
