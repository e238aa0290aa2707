"""The lint's rules on profiles: ranges that fit the graph and each other."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import helper

from edgeprune.bundle import DECODER, Bundle
from edgeprune.lint.check import lint, lint_bundle
from edgeprune.lint.graph import load_graph
from edgeprune.lint.rule import Finding, Profile, ranges_of
from edgeprune.lint.values import range_of
from edgeprune.targets import TARGETS

GOOD: Profile = {
    "text": ((1, 1, 4), (1, 16, 4), (1, 64, 4)),
    "mask": ((1, 1), (1, 16), (1, 64)),
    "image": ((1, 2, 4), (1, 8, 4), (1, 8, 4)),
    "both": ((3,), (24,), (72,)),
}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Return a graph of two segments: text with a mask of its length, and an image; `both` has the length of the two."""
    shapes: dict[str, list[str | int | None]] = {
        "text": [1, "text", 4],
        "mask": [1, "text"],
        "image": [1, "image", 4],
        "both": ["text + image"],
    }
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    nodes = [helper.make_node("Abs", [name], [f"{name}.abs"]) for name in shapes]
    outputs = [helper.make_tensor_value_info(f"{name}.abs", onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "segments", inputs, outputs), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    onnx.save(model, str(tmp_path / "graph.onnx"))
    return tmp_path / "graph.onnx"


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_ranges_that_fit(graph: Path) -> None:
    assert lint(graph, TARGETS["jetpack6"], [GOOD, GOOD]) == []
    assert lint(graph, TARGETS["jetpack6"]) == []


@pytest.mark.parametrize(
    ("changed", "name", "reason", "remedy"),
    [
        ({"other": ((1,), (1,), (1,))}, "other", "a range for other, which is no input", "Leave it out"),
        ({"mask": ((1,), (16,), (64,))}, "mask", "shapes of 1 dimensions, the input has 2", "one length for each"),
        ({"image": ((1, 9, 4), (1, 8, 4), (1, 9, 4))}, "image", "dimension 1 of image the lengths 9, 8 and 9", "min <= opt <= max"),
        (
            {"image": ((1, 2, 4), (1, 8, 4), (1, 8, 5))},
            "image",
            "dimension 2 of image the length 5, the graph fixes it to 4",
            "Give 4",
        ),
        ({"mask": ((1, 1), (1, 16), (1, 32))}, "mask", "gives text the lengths 1 to 64 in text and 1 to 32 in mask", "one range"),
        ({"mask": ((1, 1), (1, 15), (1, 64))}, "mask", "gives text the lengths", "one range in all inputs"),
        ({"both": ((3,), (24,), (64,))}, "both", "lengths of 3 to 64, but text + image reaches 3 to 72", "add up"),
    ],
)
def test_ranges_that_do_not_fit(graph: Path, changed: Profile, name: str, reason: str, remedy: str) -> None:
    found = lint(graph, TARGETS["jetpack6"], [GOOD, {**GOOD, **changed}])[0]
    assert (found.node, found.operator, found.severity) == (name, "", "error")
    assert found.reason.startswith("Profile 1 gives")
    assert reason in found.reason and remedy in found.remedy


def test_an_input_without_a_range(graph: Path) -> None:
    found = only(lint(graph, TARGETS["jetpack6"], [{name: shapes for name, shapes in GOOD.items() if name != "both"}]))
    assert found.node == "both" and "no range for both" in found.reason and "least, usual and greatest" in found.remedy


def test_onnxruntime_has_no_profiles(graph: Path) -> None:
    assert lint(graph, TARGETS["onnxruntime"], [{}]) == []


def decoder_profile(bundle: Bundle, lengths: dict[str, tuple[int, int, int]]) -> Profile:
    # The lengths of named inputs say those of the dimensions, which the exporter calls by numbers.
    inputs = load_graph(bundle.file(DECODER)).inputs
    axes = {"prefix_embeds": 1, "visual_embeds": 1, "suffix_embeds": 1, "past_key_values.0.key": 0}
    known = {str(value.shape[axes[value.name]]): lengths[value.name] for value in inputs if value.name in axes and value.shape}
    return {
        value.name: tuple(  # type: ignore[misc]
            tuple(dim if isinstance(dim, int) else known.get(dim, (1, 6, 12))[point] for dim in value.shape or ())
            for point in range(3)
        )
        for value in inputs
    }


def test_the_profiles_of_an_exported_decoder(tiny_bundle: Bundle) -> None:
    lengths = {
        "prefix_embeds": (1, 8, 16),
        "visual_embeds": (12, 12, 12),
        "suffix_embeds": (1, 8, 32),
        "past_key_values.0.key": (1, 1, 64),
    }
    profile = decoder_profile(tiny_bundle, lengths)
    assert lint_bundle(tiny_bundle, TARGETS["jetpack6"], {DECODER: [profile]}) == []
    visual = {**profile, "visual_order": ((11,), (12,), (12,))}
    found = lint_bundle(tiny_bundle, TARGETS["jetpack6"], {DECODER: [visual]})
    assert {finding.node for finding in found} == {"visual_order"}
    assert found[0].graph == DECODER


def test_ranges_of_names(graph: Path) -> None:
    ranges = ranges_of(load_graph(graph), GOOD)
    assert (ranges["text"].low, ranges["text"].high) == (1, 64)
    assert range_of("2*text + image", ranges).high == 136
