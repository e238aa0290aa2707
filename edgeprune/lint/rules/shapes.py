"""Rules on shapes: no shape may depend on data, because TensorRT computes shapes from lengths before it has the data.

The bodies of If and Loop must have fixed shapes.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import GraphProto

from edgeprune.lint.graph import Dim, Node, Scope, Value
from edgeprune.lint.operator_support import FLOATS, INTEGERS, LOGICAL
from edgeprune.lint.rule import Finding, RuleContext
from edgeprune.lint.values import is_constant

# Operator -> inputs that decide the shape of the result.
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

_SCAN_OPSET = 9  # earlier, Scan runs over a batch and its inputs are others


def shapes_from_data(context: RuleContext) -> Iterator[Finding]:
    """Find nodes whose result has a shape that is computed from the values of inputs, not from their lengths."""
    for node in context.graph.nodes:
        sources = {value.name: value for index in _SHAPING.get(node.operator, ()) for value in _origins(node, index)}
        for value in sources.values():
            yield from _judge(context, node, value)


def _judge(context: RuleContext, node: Node, value: Value) -> Iterator[Finding]:
    remedy = "Compute it from Shape, or make it a constant."
    if value.element in FLOATS | LOGICAL or (value.element in INTEGERS and len(value.shape or ()) > 1):
        reason = f"The shape of the result depends on the values of {value.name}."
        yield context.error(node, reason, remedy)
    elif value.element in INTEGERS:
        reason = f"The shape of the result is taken from the values of the input {value.name}."
        yield context.warning(node, reason, f"{remedy[:-1]}; else set its values in every profile (set_shape_input).")


def _origins(node: Node, index: int) -> list[Value]:
    # Inputs of the graph whose values, not lengths, arrive at an input of the node. Bodies of loops are not entered.
    if not node.has_input(index):
        return []
    found: list[Value] = []
    seen: set[str] = set()
    waiting = [(node.scope, node.inputs[index])]
    while waiting:
        scope, name = waiting.pop()
        if name in seen or scope.is_stored(name):
            continue
        seen.add(name)
        source = scope.producer(name)
        if source is None:
            owner = scope.owner(name)
            found += [owner.value(name)] if owner and owner.outer is None else []
        elif source.operator not in _LENGTHS_ONLY and not any(True for _ in source.bodies()):
            waiting += [(source.scope, item) for item in source.inputs if item]
    return found


def uneven_branches(context: RuleContext) -> Iterator[Finding]:
    """Find If nodes whose branches return tensors of different ranks, with a condition that is known only at run time."""
    for node in context.graph.nodes:
        if node.operator != "If" or is_constant(node.scope, node.inputs[0]):
            continue
        then, other = (_outputs(context, body) for body in node.bodies())
        for name, left, right in zip(node.outputs, then, other, strict=False):
            if left is not None and right is not None and len(left) != len(right):
                reason = f"The branches return {name} with {len(left)} and {len(right)} dimensions, TensorRT needs as many."
                yield context.error(node, reason, "Reshape the smaller one inside its branch.")


def growing_loops(context: RuleContext) -> Iterator[Finding]:
    """Find Loop and Scan nodes that carry a tensor which changes its shape on the way."""
    if context.graph.opset < _SCAN_OPSET:
        return
    for node in context.graph.nodes:
        if node.operator not in ("Loop", "Scan"):
            continue
        results = _outputs(context, next(node.bodies()))
        for index, shape in zip(_carried(node), results[1:] if node.operator == "Loop" else results, strict=False):
            start = node.input(index).shape
            if start is not None and shape is not None and _differ(start, shape):
                reason = f"{node.inputs[index]} is carried as {_format_shape(start)} and comes back as {_format_shape(shape)}."
                yield context.error(node, reason, "Carry a buffer of full length and write into it with ScatterElements.")


def open_loops(context: RuleContext) -> Iterator[Finding]:
    """Find Loop nodes that stack outputs without a limit of trips."""
    for node in context.graph.nodes:
        if node.operator == "Loop" and len(node.outputs) > len(node.inputs) - 2 and not node.has_input(0):
            reason = "The loop stacks outputs without a trip limit, so their length is unknown to TensorRT."
            yield context.error(node, reason, "Give the loop its greatest trip count.")


def _carried(node: Node) -> range:
    # Loop: trip limit, condition, states; Scan: states, then what it scans.
    return range(2, len(node.inputs)) if node.operator == "Loop" else range(len(node.inputs) - node.attribute("num_scan_inputs"))


def _outputs(context: RuleContext, body: GraphProto) -> list[tuple[Dim, ...] | None]:
    # Branches that return a tensor of the graph around declare its shape there alone.
    scope = next((item for item in context.graph.scopes if item.proto is body), None)
    return [_shape(scope, output.name) for output in body.output] if scope else []


def _shape(scope: Scope, name: str) -> tuple[Dim, ...] | None:
    return scope.value(name).shape


def _differ(left: tuple[Dim, ...], right: tuple[Dim, ...]) -> bool:
    if len(left) != len(right):
        return True
    return any(a != b for a, b in zip(left, right, strict=True) if isinstance(a, int) and isinstance(b, int))


def _format_shape(shape: tuple[Dim, ...]) -> str:
    return f"[{', '.join(str(dim) or '?' for dim in shape)}]"
