"""The lint's rules on how many tokens TopK takes, and that no shape depends on data."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import parser

from edgeprune.lint.check import lint
from edgeprune.lint.rule import Finding, Profile
from edgeprune.lint.values import ANY_LENGTH, Range, range_of
from edgeprune.targets import TARGETS


def findings_of(folder: Path, text: str, profiles: list[Profile] | None = None, target: str = "jetpack6") -> list[Finding]:
    onnx.save(parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]>\n{text}'), str(folder / "graph.onnx"))
    return lint(folder / "graph.onnx", TARGETS[target], profiles or [])


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def selection(length: int | str, count: int, attributes: str = "") -> str:
    return (
        f"agraph (float[2,{length}] x) => (float[2,n] y, int64[2,n] i) "
        f"{{ k = Constant<value = int64[1] {{{count}}}>() [pick] y, i = TopK{attributes}(x, k) }}"
    )


def test_too_many(tmp_path: Path) -> None:
    found = only(findings_of(tmp_path, selection(9000, 4000)))
    assert (found.node, found.operator, found.severity) == ("pick", "TopK", "error")
    assert "takes 4000 elements, TensorRT at most 3840" in found.reason and "3840 or fewer" in found.remedy
    assert findings_of(tmp_path, selection(9000, 3840)) == []
    assert findings_of(tmp_path, selection(9000, 4000), target="onnxruntime") == []


def test_a_count_that_reaches_too_far(tmp_path: Path) -> None:
    text = (
        "agraph (float[2,m] x) => (float[2,n] y, int64[2,n] i) "
        "{ s = Shape<start = 1>(x) c = Constant<value = int64[1] {5000}>() k = Min(s, c) [pick] y, i = TopK(x, k) }"
    )
    model = parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]>\n{text}')
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[1].dim_param = "Min(m, 5000)"
    onnx.save(model, str(tmp_path / "graph.onnx"))
    path, target = tmp_path / "graph.onnx", TARGETS["jetpack6"]
    assert "up to 5000" in only(lint(path, target)).reason
    assert only(lint(path, target, [{"x": ((2, 1), (2, 4), (2, 9000))}])).severity == "error"
    assert lint(path, target, [{"x": ((2, 1), (2, 4), (2, 3000))}]) == []


@pytest.mark.parametrize("target", ["jetpack6", "tensorrt11", "onnxruntime"])
def test_a_fixed_axis_that_is_too_short(tmp_path: Path, target: str) -> None:
    assert "takes 5 elements of an axis of 4" in only(findings_of(tmp_path, selection(4, 5), target=target)).reason
    assert findings_of(tmp_path, selection(4, 4), target=target) == []


def test_a_profile_whose_least_length_is_too_short(tmp_path: Path) -> None:
    wide: Profile = {"x": ((2, 8), (2, 16), (2, 32))}
    short: Profile = {"x": ((2, 4), (2, 16), (2, 32))}
    found = only(findings_of(tmp_path, selection("m", 6), [wide, short]))
    assert found.severity == "error" and "an axis that may have 4" in found.reason and "m is 6 or longer" in found.remedy
    assert findings_of(tmp_path, selection("m", 6), [wide]) == []
    assert only(findings_of(tmp_path, selection("m", 6))).severity == "warning"


def test_no_order(tmp_path: Path) -> None:
    found = only(findings_of(tmp_path, selection(8, 2, "<sorted = 0>")))
    assert found.severity == "error" and "sorted = 0" in found.reason and found.remedy == "Set sorted to 1."
    assert only(findings_of(tmp_path, selection(8, 2, "<sorted = 0>"), target="jetpack7.2")).severity == "warning"


def test_a_count_of_what_is_not_zero(tmp_path: Path) -> None:
    text = "agraph (float[4] x) => (int64[1,n] y) { [count] y = NonZero(x) }"
    found = only(findings_of(tmp_path, text))
    assert (found.node, found.severity) == ("count", "error")
    assert "depends on data" in found.reason and "TopK and Gather" in found.remedy
    on_masks = findings_of(tmp_path, text.replace("float", "bool"))
    assert [finding.severity for finding in on_masks] == ["error", "error"]
    assert "NonZero on BOOL" in on_masks[0].reason


@pytest.mark.parametrize("operator", ["Compress<axis = 0>(x, m)", "Unique(x)"])
def test_selections_that_no_tensorrt_parses(tmp_path: Path, operator: str) -> None:
    found = only(findings_of(tmp_path, f"agraph (float[4] x, bool[4] m) => (float[n] y) {{ [pick] y = {operator} }}"))
    assert found.severity == "error" and "TensorRT has no" in found.reason and "TopK" in found.remedy


def test_where_with_one_input(tmp_path: Path) -> None:
    found = findings_of(tmp_path, "agraph (bool[4] m) => (int64[n] y) { [pick] y = Where(m) }")
    assert "Where with one input" in next(finding for finding in found if finding.node == "pick").reason


def test_shapes_from_data(tmp_path: Path) -> None:
    text = (
        "agraph (bool[5] m, float[1] x) => (float[n] y) { a = Constant<value = int64[1] {0}>() c = Cast<to = 7>(m) "
        "k = ReduceSum<keepdims = 1>(c, a) [grow] y = Expand(x, k) }"
    )
    found = only(findings_of(tmp_path, text))
    assert (found.node, found.severity) == ("grow", "error")
    assert "depends on the values of m" in found.reason and "Shape" in found.remedy
    lengths = text.replace("c = Cast<to = 7>(m)", "c = Shape(m)")
    assert findings_of(tmp_path, lengths) == []


def test_shapes_from_integer_inputs_are_warned_of(tmp_path: Path) -> None:
    text = "agraph (float[1] x, int64[1] k) => (float[n] y) { [grow] y = Expand(x, k) }"
    found = only(findings_of(tmp_path, text))
    assert found.severity == "warning" and "values of the input k" in found.reason
    matrix = text.replace("int64[1] k", "int64[1,1] k").replace("[grow]", "a = Constant<value = int64[1] {-1}>() r = Reshape(k, a)")
    matrix = matrix.replace("Expand(x, k)", "Expand(x, r)")
    assert only(findings_of(tmp_path, matrix)).severity == "error"


def test_lengths_of_expressions() -> None:
    names = {"text": Range(1, 10), "image": Range(4, 8)}
    assert range_of(7, {}) == Range(7, 7)
    assert range_of("text", names) == Range(1, 10)
    assert range_of("text + 2*image - 1", names) == Range(8, 25)
    assert range_of("text - image", names) == Range(-7, 6)
    assert range_of("Max(0, text - image)", names) == Range(0, 6)
    assert range_of("image//2", names) == Range(2, 4)
    assert range_of("unk__0", names) == ANY_LENGTH
    assert range_of("Min(576, other)", names) == Range(0, 576, known=False)
    assert range_of("not an expression", names) == ANY_LENGTH
    assert range_of("text ** 2", names) == ANY_LENGTH
