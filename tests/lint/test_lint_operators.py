"""The lint's rules on operators, their types, their arguments and their bodies, on tiny graphs that break one each."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import parser

from edgeprune.bundle import Bundle
from edgeprune.errors import BundleError, UsageError
from edgeprune.lint import operator_support
from edgeprune.lint.check import ONNX_RULES, ONNXRUNTIME_RULES, TENSORRT_RULES, lint, lint_bundle
from edgeprune.lint.rule import Finding
from edgeprune.targets import TARGETS

ATTENTION = "agraph (float16[1,2,4,64] q, float16[1,2,6,64] k, float16[1,2,6,64] v) => (float16[1,2,4,64] y) "
WITH_PAST = (
    "agraph (float16[1,2,1,64] q, float16[1,2,1,64] k, float16[1,2,1,64] v, float16[1,2,6,64] pk, float16[1,2,6,64] pv) "
    "=> (float16[1,2,1,64] y, float16[1,2,7,64] nk, float16[1,2,7,64] nv) { [att] y, nk, nv = Attention(q, k, v, , pk, pv) }"
)
AXES = "axis = Constant<value = int64[1] {1}>()"


def findings_of(folder: Path, text: str, target: str = "jetpack6", opset: int = 20) -> list[Finding]:
    model = parser.parse_model(f'<ir_version: 9, opset_import: ["": {opset}, "com.microsoft": 1]>\n{text}')
    onnx.save(model, str(folder / "graph.onnx"))
    return lint(folder / "graph.onnx", TARGETS[target])


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


@pytest.mark.parametrize(
    ("text", "reason", "remedy"),
    [
        ("agraph (int64[4] x) => (int64[4] y) { [bad] y = BitwiseAnd(x, x) }", "has no BitwiseAnd", "And, Or, Xor"),
        (
            "agraph (float[4] x) => (uint8[4] y, float s, uint8 z) { [bad] y, s, z = DynamicQuantizeLinear(x) }",
            "has no Dyn",
            "QuantizeLin",
        ),
        (
            "agraph (float[4] x) => (float[4] y) { [bad] y = com.microsoft.QuickGelu(x) }",
            "has no com.microsoft::QuickGelu",
            "plugin",
        ),
        (
            "agraph (int64[4] x) => (float[4] y) { [bad] y = Softmax(x) }",
            "does not take Softmax on INT64",
            "Cast its input to one of",
        ),
        ("agraph (bool[4] x) => (bool[4] y) { [bad] y = Add(x, x) }", "does not take Add on BOOL", "BFLOAT16"),
        ("agraph (float[4] x) => (int64[1] y) { [bad] y = ArgMax(x) }", "two dimensions or more, this input has 1", "squeeze"),
        ("agraph (float[4] x) => (int64[1] y) { [bad] y = ArgMin(x) }", "two dimensions or more, this input has 1", "squeeze"),
        ("agraph (float[1,1,1,1,1,1,1,1,4] x) => (float[4] y) { [bad] y = Squeeze(x) }", "x has 9 dimensions", "Reshape"),
        (
            "agraph (float[2,4] x, int64[1] a) => (float[m,n] y) { [bad] y = ReduceSum(x, a) }",
            "axes of ReduceSum are computed",
            "initializer",
        ),
        (
            "agraph (float[2,4] x, int64 a) => (float[2,4] y) { [bad] y = CumSum(x, a) }",
            "axes of CumSum are computed",
            "initializer",
        ),
        (
            "agraph (float[4] x, int64[2,1] i, float[2] u) => (float[4] y) { [bad] y = ScatterND<reduction = 'add'>(x, i, u) }",
            "ScatterND with reduction add",
            "one-hot",
        ),
        (
            "agraph (float[2,4] x, float[4] s) => (float[2,4] y, float[2,1] m) { [bad] y, m = LayerNormalization(x, s) }",
            "first output of LayerNormalization alone",
            "Drop the other outputs",
        ),
        ("agraph (float[4,4] x) => (float y) { [bad] y = Einsum<equation = 'ii->'>(x) }", "ellipsis or a diagonal", "MatMul"),
        (
            "agraph (float[1,1,8,8] x) => (float[1,1,6,6] y) { [bad] y = MaxPool<kernel_shape = [2,2], dilations = [2,2]>(x) }",
            "MaxPool with dilations",
            "Set dilations to 1",
        ),
    ],
)
def test_what_jetpack6_refuses(tmp_path: Path, text: str, reason: str, remedy: str) -> None:
    errors = [finding for finding in findings_of(tmp_path, text.replace("'", '"')) if finding.severity == "error"]
    assert reason in only(errors).reason
    assert remedy in errors[0].remedy
    assert errors[0].node in ("bad", "x")


@pytest.mark.parametrize(
    "text",
    [
        "agraph (bool[4] x) => (bool[4] y) { y = And(x, x) }",
        "agraph (float[4] x) => (float[4] y) { y = Softmax(x) }",
        "agraph (float[1,4] x) => (int64[1,1] y) { y = ArgMax<axis = 1>(x) }",
        f"agraph (float[2,4] x) => (float[2,1] y) {{ {AXES} y = ReduceSum(x, axis) }}",
        "agraph (float[2,4] x) => (float[2,1] y) { a = Constant<value_int = 1>() t = Constant<value = int64[1] {1}>() "
        "b = Reshape(a, t) y = ReduceSum(x, b) }",
        "agraph (float[4] x, int64[2,1] i, float[2] u) => (float[4] y) { y = ScatterND(x, i, u) }",
        "agraph (float[2,4] x, float[4] s) => (float[2,4] y) { y = LayerNormalization(x, s) }",
        'agraph (float[2,4,4] x) => (float[2,4,4] y) { y = Einsum<equation = "abc,acd->abd">(x, x) }',
        "agraph (float[1,1,8,8] x) => (float[1,1,7,7] y) { y = MaxPool<kernel_shape = [2,2], dilations = [1,1]>(x) }",
        "agraph (int64[4] x) => (float[4] y) { y = Cast<to = 1>(x) }",
    ],
)
def test_what_jetpack6_takes(tmp_path: Path, text: str) -> None:
    assert findings_of(tmp_path, text) == []


def test_attention_with_a_cache_is_refused_for_other_reasons_by_old_and_new_tensorrt(tmp_path: Path) -> None:
    old = [finding for finding in findings_of(tmp_path, WITH_PAST, "jetpack6", 23) if finding.operator == "Attention"]
    assert "since 10.14, the target has 10.3" in only(old).reason
    assert "decomposes" in old[0].remedy
    new = findings_of(tmp_path, WITH_PAST, "jetpack7.2", 23)
    assert [finding.node for finding in new] == ["att", "att"]
    assert "past_key and past_value" in new[0].reason and "Concatenate the cache" in new[0].remedy
    assert "one output" in new[1].reason


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        ("y = Attention<is_causal = 1>(q, k, v, m)", "is_causal of Attention together with a mask"),
        ("y = Attention<softcap = 30.0>(q, k, v)", "softcap"),
        ("y = Attention<softmax_precision = 1>(q, k, v)", "softmax_precision"),
    ],
)
def test_attention_options(tmp_path: Path, attention: str, reason: str) -> None:
    mask = "m = Constant<value = float16[1,6] {0, 0, 0, 0, 0, 0}>()"
    found = findings_of(tmp_path, f"{ATTENTION} {{ {mask} [att] {attention} }}", "jetpack7.2", 23)
    assert reason in only(found).reason
    plain = f"{ATTENTION} {{ {mask} y = Attention(q, k, v, m) }}"
    assert findings_of(tmp_path, plain, "jetpack7.2", 23) == []
    assert "FLOAT" in only(findings_of(tmp_path, plain.replace("float16", "float"), "jetpack7.2", 23)).reason


def test_operators_come_with_their_versions(tmp_path: Path) -> None:
    swish = "agraph (float[4] x) => (float[4] y) { [act] y = Swish(x) }"
    assert "since 11.0, the target has 10.16" in only(findings_of(tmp_path, swish, "jetpack7.2", 24)).reason
    assert findings_of(tmp_path, swish, "tensorrt11", 24) == []
    norm = "agraph (float[2,4] x, float[4] s) => (float[2,4] y) { y = RMSNormalization(x, s) }"
    assert findings_of(tmp_path, norm, "jetpack7.2", 23) == []
    assert "RMSNormalization" in findings_of(tmp_path, norm, "jetpack7", 22)[0].operator


def test_opsets(tmp_path: Path) -> None:
    text = "agraph (float[4] x) => (float[4] y) { y = Abs(x) }"
    newer = [only(findings_of(tmp_path, text, "jetpack6", opset)) for opset in (21, 22)]
    assert [finding.severity for finding in newer] == ["warning", "error"]
    assert "Opset 22 is newer than 20" in newer[1].reason and "opset 20 or lower" in newer[1].remedy
    assert findings_of(tmp_path, text, "jetpack7", 21) == []
    assert only(findings_of(tmp_path, text, "onnxruntime", 23)).severity == "warning"


def test_types_that_only_newer_versions_take_are_warned_of(tmp_path: Path) -> None:
    text = "agraph (int64[4] x) => (int64[4] y) { [power] y = Pow(x, x) }"
    warning = only(findings_of(tmp_path, text))
    assert (warning.severity, warning.node) == ("warning", "power")
    assert findings_of(tmp_path, text, "jetpack7.2") == []


def test_branches_and_loops(tmp_path: Path) -> None:
    branches = (
        "agraph (bool c, float[4] x) => (float[n] y) { [fork] y = If(c)"
        "<then_branch = t () => (float[4] a) { a = Abs(x) }, else_branch = e () => (float[1,4] b) "
        "{ z = Constant<value = int64[1] {0}>() b = Unsqueeze(x, z) }> }"
    )
    found = only(findings_of(tmp_path, branches))
    assert found.node == "fork" and "1 and 2 dimensions" in found.reason
    limit, go = "m = Constant<value = int64 {3}>()", "c = Constant<value = bool {1}>()"
    loop = (
        f"agraph (float[4] x) => (float[n] y) {{ {limit} {go} [turn] y = Loop(m, c, x)<body = b (int64 i, bool ci, float[4] s) "
        "=> (bool co, float[8] s2) { co = Identity(ci) s2 = Concat<axis = 0>(s, s) }> }"
    )
    assert "carried as [4] and comes back as [8]" in only(findings_of(tmp_path, loop)).reason
    good = loop.replace("float[8] s2", "float[4] s2").replace("Concat<axis = 0>(s, s)", "Add(s, s)")
    assert findings_of(tmp_path, good) == []
    assert "has no BitwiseNot" in only(findings_of(tmp_path, good.replace("Add(s, s)", "BitwiseNot(s)"))).reason


def test_quantized_weights_beside_a_loop_are_warned_of(tmp_path: Path) -> None:
    constants = "m = Constant<value = int64 {3}>() c = Constant<value = bool {1}>() s = Constant<value = float {0.5}>()"
    body = "<body = b (int64 i, bool ci, float[4] t) => (bool co, float[4] t2) { co = Identity(ci) t2 = Add(t, t) }>"
    both = (
        f"agraph (float[4] x) => (float[4] y) {{ {constants} w = Constant<value = int8[4] {{1, 2, 3, 4}}>() "
        f"[weight] d = DequantizeLinear(w, s) z = Mul(x, d) y = Loop(m, c, z){body} }}"
    )
    warning = only(findings_of(tmp_path, both))
    assert (warning.severity, warning.node) == ("warning", "weight") and "--precision fp16" in warning.remedy
    assert findings_of(tmp_path, both.replace("DequantizeLinear(w, s)", "Cast<to = 1>(w)")) == []
    assert findings_of(tmp_path, both.replace(f"y = Loop(m, c, z){body}", "y = Identity(z)")) == []


def test_onnxruntime_has_none_of_tensorrts_limits(tmp_path: Path) -> None:
    for text in (
        "agraph (float[4] x) => (int64[1] y) { y = ArgMax(x) }",
        "agraph (int64[4] x) => (int64[4] y) { y = BitwiseAnd(x, x) }",
        "agraph (float[4] x) => (float[4] y) { y = com.microsoft.QuickGelu(x) }",
    ):
        assert findings_of(tmp_path, text, "onnxruntime") == []


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"\xff\xfe no graph")
    with pytest.raises(BundleError, match="Cannot read the graph"):
        lint(tmp_path / "broken.onnx", TARGETS["jetpack6"])


def test_requests_are_refused_not_changed(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="Unknown module 'Xavier'"):
        lint_bundle(tiny_bundle, TARGETS["jetpack6"], modules=["Xavier"])
    with pytest.raises(UsageError, match="no graph 'onnx/other"):
        lint_bundle(tiny_bundle, TARGETS["jetpack6"], {"onnx/other.onnx": []})


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_an_exported_bundle_passes(tiny_bundle: Bundle, target: str) -> None:
    assert lint_bundle(tiny_bundle, TARGETS[target]) == []


def test_every_rule_is_listed_once_and_described() -> None:
    rules = [*ONNX_RULES, *ONNXRUNTIME_RULES, *TENSORRT_RULES]
    assert len(set(rules)) == len(rules)
    assert all(rule.__doc__ and rule.__doc__.startswith("Find ") for rule in rules)


def test_the_table_names_operators_of_onnx() -> None:
    known = (
        set(operator_support.OPERATORS)
        | operator_support.MOVERS
        | set(operator_support.TYPED_INPUT)
        | (set(operator_support.INSTEAD) - {"MatMulNBits"})
    )
    assert {name for name in known if not onnx.defs.has(name)} == set()
    assert not set(operator_support.INSTEAD) & set(operator_support.OPERATORS)
    assert {item for support in operator_support.OPERATORS.values() for item in support.types} <= set(
        onnx.TensorProto.DataType.keys()
    )
