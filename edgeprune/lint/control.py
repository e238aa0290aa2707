"""Rules on If and Loop, whose bodies TensorRT builds with fixed shapes."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import GraphProto

from edgeprune.lint.constants import is_constant
from edgeprune.lint.findings import Finding
from edgeprune.lint.graphs import Node, Scope
from edgeprune.lint.lengths import Dim
from edgeprune.lint.subject import Subject

_SCAN_OPSET = 9  # earlier, Scan runs over a batch and its inputs are others


def uneven_branches(subject: Subject) -> Iterator[Finding]:
    """Find If nodes whose branches return tensors of different ranks, with a condition that is known only at run time."""
    for node in subject.graph.nodes:
        if node.operator != "If" or is_constant(node.scope, node.inputs[0]):
            continue
        then, other = (_outputs(subject, body) for body in node.bodies())
        for name, left, right in zip(node.outputs, then, other, strict=False):
            if left is not None and right is not None and len(left) != len(right):
                reason = f"The branches return {name} with {len(left)} and {len(right)} dimensions, TensorRT needs as many."
                yield subject.error(node, reason, "Reshape the smaller one inside its branch.")


def growing_loops(subject: Subject) -> Iterator[Finding]:
    """Find Loop and Scan nodes that carry a tensor which changes its shape on the way."""
    if subject.graph.opset < _SCAN_OPSET:
        return
    for node in subject.graph.nodes:
        if node.operator not in ("Loop", "Scan"):
            continue
        results = _outputs(subject, next(node.bodies()))
        for index, shape in zip(_carried(node), results[1:] if node.operator == "Loop" else results, strict=False):
            start = node.input(index).shape
            if start is not None and shape is not None and _differ(start, shape):
                reason = f"{node.inputs[index]} is carried as {_words(start)} and comes back as {_words(shape)}."
                yield subject.error(node, reason, "Carry a buffer of full length and write into it with ScatterElements.")


def open_loops(subject: Subject) -> Iterator[Finding]:
    """Find Loop nodes that stack outputs without a limit of trips."""
    for node in subject.graph.nodes:
        if node.operator == "Loop" and len(node.outputs) > len(node.inputs) - 2 and not node.has_input(0):
            reason = "The loop stacks outputs without a trip limit, so their length is unknown to TensorRT."
            yield subject.error(node, reason, "Give the loop its greatest trip count.")


def _carried(node: Node) -> range:
    # Loop: trip limit, condition, states; Scan: states, then what it scans.
    return range(2, len(node.inputs)) if node.operator == "Loop" else range(len(node.inputs) - node.attribute("num_scan_inputs"))


def _outputs(subject: Subject, body: GraphProto) -> list[tuple[Dim, ...] | None]:
    # Branches that return a tensor of the graph around declare its shape there alone.
    scope = next((item for item in subject.graph.scopes if item.proto is body), None)
    return [_shape(scope, output.name) for output in body.output] if scope else []


def _shape(scope: Scope, name: str) -> tuple[Dim, ...] | None:
    return scope.value(name).shape


def _differ(left: tuple[Dim, ...], right: tuple[Dim, ...]) -> bool:
    if len(left) != len(right):
        return True
    return any(a != b for a, b in zip(left, right, strict=True) if isinstance(a, int) and isinstance(b, int))


def _words(shape: tuple[Dim, ...]) -> str:
    return f"[{', '.join(str(dim) or '?' for dim in shape)}]"
