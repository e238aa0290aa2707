"""Rules on QuantizeLinear and DequantizeLinear: TensorRT has symmetric INT8, INT4 weights in blocks, FP8 and FP4."""

from __future__ import annotations

from collections.abc import Iterator

from edgeprune.lint.constants import constant, is_constant
from edgeprune.lint.facts import FP4, FP4_MODULES, FP8, FP8_MODULES, IMAGES, INT4_BLOCKS, Version
from edgeprune.lint.findings import Finding
from edgeprune.lint.graphs import Node, Value
from edgeprune.lint.subject import Subject

_ZERO_POINT = 2
_FP4_SINCE: Version = (10, 8)


def zero_points(subject: Subject) -> Iterator[Finding]:
    """Find zero points that are not 0, or not known when the engine is built."""
    for node in _pairs(subject):
        if not node.has_input(_ZERO_POINT) or _quantized(node).element in IMAGES:
            continue
        name = node.inputs[_ZERO_POINT]
        remedy = "Quantize symmetrically and leave the zero point out."
        if not is_constant(node.scope, name):
            yield subject.error(node, f"The zero point {name} is computed, and TensorRT takes 0 alone.", remedy)
            continue
        found = constant(node.scope, name)
        if found is not None and bool((found != found.dtype.type(0)).any()):
            yield subject.error(node, f"The zero point {name} is not 0, and TensorRT quantizes symmetrically.", remedy)


def unsigned_bytes(subject: Subject) -> Iterator[Finding]:
    """Find quantization to UINT8, which TensorRT has on DLA alone."""
    for node in _pairs(subject):
        if _quantized(node).element in IMAGES:
            yield subject.error(
                node, f"TensorRT does not take {node.operator} of UINT8.", "Quantize to INT8 with a zero point of 0."
            )


def int4_blocks(subject: Subject) -> Iterator[Finding]:
    """Find INT4 that is no stored weight, or whose blocks do not fit."""
    for node in _pairs(subject):
        value = _quantized(node)
        if value.element != "INT4":
            continue
        if not is_constant(node.scope, node.inputs[0]):
            reason = "INT4 is computed here, and TensorRT documents it for weights alone."
            yield subject.error(node, reason, "Store the INT4 weights as an initializer, or quantize activations to INT8.")
        size = int(node.attribute("block_size", 0))
        if size:
            yield from _blocks(subject, node, value, size)


def small_floats(subject: Subject) -> Iterator[Finding]:
    """Find FP8 and FP4 for a target or a Jetson that has none."""
    for node in _pairs(subject):
        element = _quantized(node).element
        if element not in FP8 | FP4:
            continue
        if element in FP4 and subject.tensorrt < _FP4_SINCE:
            yield subject.error(node, f"TensorRT parses {element} since 10.8.", "Quantize to INT4.")
        able = FP4_MODULES if element in FP4 else FP8_MODULES
        unable = [module for module in subject.modules if module not in able]
        if unable:
            report = subject.warning if set(subject.modules) & able else subject.error
            instead = "INT4" if element in FP4 else "INT8 or INT4"
            yield report(node, f"{' and '.join(unable)} cannot compute with {element}.", f"Quantize to {instead} there.")


def packed_borders(subject: Subject) -> Iterator[Finding]:
    """Find inputs and outputs of the network in INT4, FP8 or FP4, which TensorRT has inside alone."""
    for value in (*subject.graph.inputs, *subject.graph.outputs):
        if value.element in FP8 | FP4 | {"INT4"}:
            reason = f"{value.name} crosses the border of the network as {value.element}, which TensorRT has inside alone."
            yield subject.error(value, reason, "Dequantize inside the network, or make it an initializer.")


def _pairs(subject: Subject) -> Iterator[Node]:
    return (node for node in subject.graph.nodes if node.operator in ("QuantizeLinear", "DequantizeLinear"))


def _quantized(node: Node) -> Value:
    return node.output() if node.operator == "QuantizeLinear" else node.input(0)


def _blocks(subject: Subject, node: Node, value: Value, size: int) -> Iterator[Finding]:
    axis = int(node.attribute("axis", 1))
    length = value.shape[axis] if value.shape is not None and -len(value.shape) <= axis < len(value.shape) else None
    if isinstance(length, int) and length % size:
        reason = f"Blocks of {size} do not divide the {length} elements of axis {axis}."
        yield subject.error(node, reason, "Take a block size that divides the axis, or pad the weights.")
    if size not in INT4_BLOCKS:
        sizes = ", ".join(map(str, INT4_BLOCKS))
        yield subject.error(
            node, f"TensorRT's INT4 has blocks of {sizes}, this node has {size}.", f"Quantize in blocks of {sizes}."
        )
