"""Rules on element types: those that TensorRT lacks, changes silently, or has at the borders of a network alone."""

from __future__ import annotations

from collections.abc import Iterator

from edgeprune.lint.facts import DOUBLES, IMAGES, KNOWN_TYPES
from edgeprune.lint.findings import Finding
from edgeprune.lint.graphs import Node, Scope, Value
from edgeprune.lint.subject import Subject

# Operator -> the inputs that must be of one type; no inputs: all of them. Pow is not here, its exponent may differ.
_ONE_TYPE = "Add Concat Div Equal Gemm Greater GreaterOrEqual Less LessOrEqual MatMul Max Mean Min Mod Mul PRelu Range Sub Sum"
_SAME_TYPE: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(_ONE_TYPE.split(), ()),
    "ScatterElements": (0, 2),
    "ScatterND": (0, 2),
    "Where": (1, 2),
}
_TAKE_BYTES = ("Cast", "CastLike", "DequantizeLinear", "Identity", "Shape", "Size")


def lacking_types(subject: Subject) -> Iterator[Finding]:
    """Find tensors of an element type that TensorRT does not have."""
    for scope, value in _values(subject):
        if value.element and value.element not in KNOWN_TYPES:
            reason = f"{value.name} is of {value.element}, which TensorRT does not have."
            remedy = (
                "Use INT4 with zero points of 0." if value.element == "UINT4" else "Cast to INT32, INT64 or FLOAT where it is made."
            )
            yield subject.error(scope.producer(value.name) or value, reason, remedy)


def doubles(subject: Subject) -> Iterator[Finding]:
    """Find where float64 begins: TensorRT reads it as float32 without a word."""
    reason = "TensorRT computes float64 as float32 without saying so."
    for scope, value in _values(subject):
        if value.element in DOUBLES:
            node = scope.producer(value.name)
            if node is None or not any(node.input(index).element in DOUBLES for index in range(len(node.inputs))):
                yield subject.warning(node or value, reason, "Cast to float32 yourself, or keep the values small enough for it.")


def inner_bytes(subject: Subject) -> Iterator[Finding]:
    """Find UINT8 inside a network; TensorRT has it at inputs and outputs, next to a Cast."""
    borders = {value.name for value in subject.graph.outputs}
    for node in subject.graph.nodes:
        taken = [value.name for value in map(node.input, range(len(node.inputs))) if value.element in IMAGES]
        if taken and node.operator not in _TAKE_BYTES and node.operator != "QuantizeLinear":
            reason = f"{node.operator} computes on UINT8 ({taken[0]}), which TensorRT takes at inputs and outputs alone."
            yield subject.error(node, reason, "Cast it to INT32 or FLOAT16 first.")
        elif node.operator in ("Cast", "CastLike") and node.output().element in IMAGES and node.output().name not in borders:
            reason = f"{node.output().name} becomes UINT8 inside the network, which TensorRT takes at inputs and outputs alone."
            yield subject.error(node, reason, "Cast to INT32 instead.")


def mixed_types(subject: Subject) -> Iterator[Finding]:
    """Find nodes whose inputs must be of one type and are not; INT32 beside INT64 is the usual case."""
    for node in subject.graph.nodes:
        if node.operator in _SAME_TYPE:
            chosen = _SAME_TYPE[node.operator] or tuple(range(len(node.inputs)))
            elements = sorted({node.input(index).element for index in chosen} - {""})
            if len(elements) > 1:
                reason = f"{node.operator} is given {' and '.join(elements)}, and takes one type."
                yield subject.error(node, reason, f"Cast its inputs to {_widest(node, chosen)}.")


def _values(subject: Subject) -> Iterator[tuple[Scope, Value]]:
    for scope in subject.graph.scopes:
        yield from ((scope, value) for value in scope.values.values())


def _widest(node: Node, chosen: tuple[int, ...]) -> str:
    elements = {node.input(index).element for index in chosen}
    order = ("INT64", "INT32", "FLOAT16", "BFLOAT16", "FLOAT")
    return next((element for element in order if element in elements), "one type")
