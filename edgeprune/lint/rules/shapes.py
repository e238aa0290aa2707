"""Rules on shapes: no shape may depend on data, and the bodies of If, Loop and Scan must return shapes that TensorRT supports.

TensorRT computes shapes from the lengths of inputs before execution.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import GraphProto

from edgeprune.lint.graph import Dim, Node, Value
from edgeprune.lint.operator_support import FLOATS, INTEGERS, LOGICAL
from edgeprune.lint.rule import Finding, RuleContext
from edgeprune.lint.values import is_constant

# Operator -> inputs that determine the shape of the result.
_SHAPING = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
}
_LENGTHS_ONLY = ("Shape", "Size", "Constant")

_SCAN_OPSET = 9  # earlier versions of Scan have a batch axis and other inputs


def shapes_from_data(context: RuleContext) -> Iterator[Finding]:
    """Find nodes whose output shape is computed from the values of inputs, not from their lengths."""
    for node in context.graph.nodes:
        sources = {value.name: value for index in _SHAPING.get(node.operator, ()) for value in _origins(node, index)}
        for value in sources.values():
            yield from _check_source(context, node, value)


def uneven_branches(context: RuleContext) -> Iterator[Finding]:
    """Find If nodes with a run-time condition whose branches return tensors of different ranks."""
    for node in context.graph.nodes:
        if node.operator != "If" or is_constant(node.scope, node.inputs[0]):
            continue
        then, other = (_output_shapes(context, body) for body in node.bodies())
        for name, left, right in zip(node.outputs, then, other, strict=False):
            if left is not None and right is not None and len(left) != len(right):
                reason = f"The branches return {name} with {len(left)} and {len(right)} dimensions, TensorRT needs as many."
                yield context.error(node, reason, "Reshape the smaller one inside its branch.")


def growing_loops(context: RuleContext) -> Iterator[Finding]:
    """Find Loop and Scan nodes with a loop-carried tensor that changes shape."""
    if context.graph.opset < _SCAN_OPSET:
        return
    for node in context.graph.nodes:
        if node.operator not in ("Loop", "Scan"):
            continue
        results = _output_shapes(context, next(node.bodies()))
        for index, shape in zip(_carried(node), results[1:] if node.operator == "Loop" else results, strict=False):
            start = node.input(index).shape
            if start is not None and shape is not None and _differ(start, shape):
                reason = f"{node.inputs[index]} is carried as {_format_shape(start)} and comes back as {_format_shape(shape)}."
                yield context.error(node, reason, "Carry a buffer of full length and write into it with ScatterElements.")


def open_loops(context: RuleContext) -> Iterator[Finding]:
    """Find Loop nodes that stack outputs without a trip limit."""
    for node in context.graph.nodes:
        if node.operator == "Loop" and len(node.outputs) > len(node.inputs) - 2 and not node.has_input(0):
            reason = "The loop stacks outputs without a trip limit, so their length is unknown to TensorRT."
            yield context.error(node, reason, "Give the loop its greatest trip count.")


def _check_source(context: RuleContext, node: Node, value: Value) -> Iterator[Finding]:
    remedy = "Compute it from Shape, or make it a constant."
    if value.element in FLOATS | LOGICAL or (value.element in INTEGERS and len(value.shape or ()) > 1):
        reason = f"The shape of the result depends on the values of {value.name}."
        yield context.error(node, reason, remedy)
    elif value.element in INTEGERS:
        reason = f"The shape of the result is taken from the values of the input {value.name}."
        yield context.warning(node, reason, f"{remedy[:-1]}; else set its values in every profile (set_shape_input).")


def _origins(node: Node, index: int) -> list[Value]:
    # Graph inputs whose values, not lengths, reach an input of the node. Loop bodies are not entered.
    if not node.has_input(index):
        return []
    found: list[Value] = []
    visited: set[str] = set()
    pending = [(node.scope, node.inputs[index])]
    while pending:
        scope, name = pending.pop()
        if name in visited or scope.is_stored(name):
            continue
        visited.add(name)
        source = scope.producer(name)
        if source is None:
            owner = scope.owner(name)
            found += [owner.value(name)] if owner and owner.outer is None else []
        elif source.operator not in _LENGTHS_ONLY and not any(True for _ in source.bodies()):
            pending += [(source.scope, item) for item in source.inputs if item]
    return found


def _carried(node: Node) -> range:
    # Inputs of Loop: trip limit, condition, states. Inputs of Scan: states, scanned tensors.
    return range(2, len(node.inputs)) if node.operator == "Loop" else range(len(node.inputs) - node.attribute("num_scan_inputs"))


def _output_shapes(context: RuleContext, body: GraphProto) -> list[tuple[Dim, ...] | None]:
    # A branch may return a tensor of an outer scope, which alone declares its shape.
    scope = next((item for item in context.graph.scopes if item.proto is body), None)
    return [scope.value(output.name).shape for output in body.output] if scope else []


def _differ(left: tuple[Dim, ...], right: tuple[Dim, ...]) -> bool:
    if len(left) != len(right):
        return True
    return any(a != b for a, b in zip(left, right, strict=True) if isinstance(a, int) and isinstance(b, int))


def _format_shape(shape: tuple[Dim, ...]) -> str:
    return f"[{', '.join(str(dim) or '?' for dim in shape)}]"
