"""The rule that no shape depends on data: TensorRT computes shapes from lengths, before the data are there."""

from __future__ import annotations

from collections.abc import Iterator

from edgeprune.lint.facts import FLOATS, INTEGERS, LOGICAL
from edgeprune.lint.findings import Finding
from edgeprune.lint.graphs import Node, Value
from edgeprune.lint.subject import Subject

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


def shapes_from_data(subject: Subject) -> Iterator[Finding]:
    """Find nodes whose result has a shape that is computed from the values of inputs, not from their lengths."""
    for node in subject.graph.nodes:
        sources = {value.name: value for index in _SHAPING.get(node.operator, ()) for value in _origins(node, index)}
        for value in sources.values():
            yield from _judge(subject, node, value)


def _judge(subject: Subject, node: Node, value: Value) -> Iterator[Finding]:
    remedy = "Compute it from Shape, or make it a constant."
    if value.element in FLOATS | LOGICAL or (value.element in INTEGERS and len(value.shape or ()) > 1):
        reason = f"The shape of the result depends on the values of {value.name}."
        yield subject.error(node, reason, remedy)
    elif value.element in INTEGERS:
        reason = f"The shape of the result is taken from the values of the input {value.name}."
        yield subject.warning(node, reason, f"{remedy[:-1]}; else set its values in every profile (set_shape_input).")


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
