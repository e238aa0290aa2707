"""The lint against NVIDIA's own parser and builder, on tiny graphs, where tensorrt-rtx is installed.

It needs no GPU and is newer and smaller than the TensorRT of a Jetson: strongly typed always, without the plugins. Where it is
known to differ, DIFFERENCES says how. Its `supports_operator` says yes to operators that it then refuses, and is not asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import parser

from edgeprune.lint.check import lint
from edgeprune.lint.rule import Profile
from edgeprune.targets import TARGETS

trt = pytest.importorskip("tensorrt_rtx")

VECTOR, MATRIX = "agraph (float[4] x) => (float[4] y)", "agraph (float[2,m] x) => (float[2,n] y, int64[2,n] i)"
HEADS = "agraph (float16[1,2,4,64] q, float16[1,2,4,64] k, float16[1,2,4,64] v) => (float16[1,2,4,64] y)"
Q = "s = Constant<value = float {0.5}>() q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)"
LOOP = (
    "m = Constant<value = int64 {3}>() c = Constant<value = bool {1}>() y = Loop(m, c, x)"
    "<body = b (int64 i, bool ci, float[4] s) => (bool co, float[4] s2) { co = Identity(ci) s2 = Add(s, s) }>"
)


def top(count: int) -> str:
    return f"{{ k = Constant<value = int64[1] {{{count}}}>() y, i = TopK(x, k) }}"


def lengths(low: int, usual: int, high: int) -> list[Profile]:
    return [{"x": ((2, low), (2, usual), (2, high))}]


AGREED: dict[str, tuple[bool, str, list[Profile]]] = {
    "abs": (True, f"{VECTOR} {{ y = Abs(x) }}", []),
    "softmax int64": (False, "agraph (int64[4] x) => (int64[4] y) { y = Softmax(x) }", []),
    "add bool": (False, "agraph (bool[4] x) => (bool[4] y) { y = Add(x, x) }", []),
    "clip int64": (True, "agraph (int64[4] x) => (int64[4] y) { y = Clip(x) }", []),
    "bitwise": (False, "agraph (int64[4] x) => (int64[4] y) { y = BitwiseAnd(x, x) }", []),
    "unknown domain": (False, f"{VECTOR} {{ y = com.microsoft.QuickGelu(x) }}", []),
    "swish": (True, f"{VECTOR} {{ y = Swish(x) }}", []),
    "argmax on rank 1": (False, "agraph (float[4] x) => (int64[1] i) { i = ArgMax(x) }", []),
    "argmax on rank 2": (True, "agraph (float[1,4] x) => (int64[1,1] i) { i = ArgMax<axis = 1>(x) }", []),
    "rank 9": (False, "agraph (float[1,1,1,1,1,1,1,1,4] x) => (float[1,1,1,1,1,1,1,1,4] y) { y = Abs(x) }", []),
    "top 3840": (True, f"{MATRIX} {top(3840)}", lengths(4000, 4000, 8000)),
    "top 3841": (False, f"{MATRIX} {top(3841)}", lengths(4000, 4000, 8000)),
    "top of a short axis": (False, f"{MATRIX} {top(5)}", lengths(1, 4, 8)),
    "top of a long axis": (True, f"{MATRIX} {top(4)}", lengths(4, 4, 8)),
    "no profile": (False, f"{MATRIX} {top(4)}", [{}]),
    "compress": (False, "agraph (float[4] x, bool[4] m) => (float[n] y) { y = Compress<axis = 0>(x, m) }", []),
    "unique": (False, "agraph (float[4] x) => (float[n] y) { y = Unique(x) }", []),
    "shape from data": (
        False,
        "agraph (bool[4] m, float[1] x) => (float[n] y) { a = Constant<value = int64[1] {0}>() c = Cast<to = 7>(m) "
        "k = ReduceSum<keepdims = 1>(c, a) y = Expand(x, k) }",
        [],
    ),
    "computed axes": (False, "agraph (float[2,4] x, int64[1] a) => (float[n,l] y) { y = ReduceSum(x, a) }", []),
    "scatter and add": (
        False,
        'agraph (float[4] x, int64[2,1] i, float[2] u) => (float[4] y) { y = ScatterND<reduction = "add">(x, i, u) }',
        [],
    ),
    "attention": (True, f"{HEADS} {{ y = Attention(q, k, v) }}", []),
    "attention softcap": (False, f"{HEADS} {{ y = Attention<softcap = 9.0>(q, k, v) }}", []),
    "attention two outputs": (
        False,
        HEADS.replace("64] y", "64] y, float16[1,2,4,64] a, float16[1,2,4,64] b") + " { y, a, b = Attention(q, k, v, , k, v) }",
        [],
    ),
    "symmetric": (True, f"{VECTOR} {{ z = Constant<value = int8 {{0}}>() {Q} }}", []),
    "asymmetric": (False, f"{VECTOR} {{ z = Constant<value = int8 {{1}}>() {Q} }}", []),
    "scale of 0": (False, f"{VECTOR} {{ z = Constant<value = int8 {{0}}>() {Q.replace('0.5', '0.0')} }}", []),
    "negative scale": (False, f"{VECTOR} {{ z = Constant<value = int8 {{0}}>() {Q.replace('0.5', '-0.5')} }}", []),
    "unsigned": (False, f"{VECTOR} {{ z = Constant<value = uint8 {{128}}>() {Q} }}", []),
    "int16": (False, f"{VECTOR} {{ a = Cast<to = 5>(x) y = Cast<to = 1>(a) }}", []),
    "float64": (True, f"{VECTOR} {{ a = Cast<to = 11>(x) y = Cast<to = 1>(a) }}", []),
    "bytes inside": (False, f"{VECTOR} {{ a = Cast<to = 2>(x) y = Cast<to = 1>(a) }}", []),
    "bytes at the border": (True, "agraph (uint8[4] x) => (float[4] y) { y = Cast<to = 1>(x) }", []),
    "mixed integers": (False, "agraph (int64[4] a, int32[4] b) => (int64[8] y) { y = Concat<axis = 0>(a, b) }", []),
    "loop": (True, f"{VECTOR} {{ {LOOP} }}", []),
    "growing loop": (
        False,
        f"{VECTOR.replace('4] y', 'n] y')} {{ {LOOP.replace('4] s2', '8] s2').replace('Add(s, s)', 'Concat<axis = 0>(s, s)')} }}",
        [],
    ),
    "nonzero": (False, "agraph (float[4] x) => (int64[1,n] y) { y = NonZero(x) }", []),
    "uneven branches": (
        False,
        "agraph (bool c, float[4] x) => (float[n] y) { y = If(c)<then_branch = t () => (float[4] a) { a = Abs(x) }, "
        "else_branch = e () => (float[1,4] b) { z = Constant<value = int64[1] {0}>() b = Unsqueeze(x, z) }> }",
        [],
    ),
}

# What the lint says, what tensorrt-rtx does, and why they may differ.
DIFFERENCES: dict[str, tuple[bool, bool, str, list[Profile]]] = {
    # Parsed by a Jetson's TensorRT; here it is a plugin that the wheel lacks. The lint warns.
    "scatter elements": (
        True,
        False,
        'agraph (float[4] x, int64[2] i, float[2] u) => (float[4] y) { y = ScatterElements<reduction = "mul">(x, i, u) }',
        [],
    ),
    # The builder tries the usual and the greatest length; an engine is also run with the least.
    "top at the least length": (False, True, f"{MATRIX} {top(2)}", lengths(1, 4, 8)),
    # Two dimensions of one name: not compared.
    "unequal ranges": (
        False,
        True,
        "agraph (float[n] x, float[n] z) => (float[n] y, float[n] w) { y = Abs(x) w = Neg(z) }",
        [{"x": ((1,), (4,), (8,)), "z": ((1,), (4,), (4,))}],
    ),
    # Its kernels for FLOAT are few; the lint warns.
    "attention in float32": (True, False, f"{HEADS.replace('float16', 'float')} {{ y = Attention(q, k, v) }}", []),
}


def saved(folder: Path, text: str) -> Path:
    opset = 24 if "Swish" in text or "Attention" in text else 20
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]>\n{text}')
    onnx.save(model, str(folder / "graph.onnx"))
    return folder / "graph.onnx"


def passes_lint(path: Path, profiles: list[Profile]) -> bool:
    return all(finding.severity == "warning" for finding in lint(path, TARGETS["tensorrt11"], profiles, modules=["Orin"]))


def builds(path: Path, profiles: list[Profile]) -> bool:
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if not trt.OnnxParser(network, logger).parse_from_file(str(path)):
        return False
    config: Any = builder.create_builder_config()
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(trt.ComputeCapability.SM80, 0)  # of Orin's instruction family, without FP8 too
    for ranges in filter(None, profiles):
        profile = builder.create_optimization_profile()
        for name, shapes in ranges.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize("case", AGREED)
def test_the_lint_and_the_builder_agree(tmp_path: Path, case: str) -> None:
    passes, text, profiles = AGREED[case]
    path = saved(tmp_path, text)
    assert (passes_lint(path, profiles), builds(path, profiles)) == (passes, passes)


@pytest.mark.parametrize("case", DIFFERENCES)
def test_known_differences_are_still_there(tmp_path: Path, case: str) -> None:
    linted, built, text, profiles = DIFFERENCES[case]
    path = saved(tmp_path, text)
    assert (passes_lint(path, profiles), builds(path, profiles)) == (linted, built)
    assert lint(path, TARGETS["tensorrt11"], profiles, modules=["Orin"])  # at least a warning
