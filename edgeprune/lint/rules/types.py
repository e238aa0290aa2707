"""Rules on element types that TensorRT lacks, silently changes, or accepts only at the inputs and outputs of a network.

Quantization: TensorRT supports symmetric INT8, block-wise INT4 weights, FP8 and FP4.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgeprune.lint.graph import Node, Scope, Value
from edgeprune.lint.operator_support import (
    DOUBLES,
    DYNAMIC_FP4,
    FP4,
    FP4_BLOCK,
    FP4_MODULES,
    FP8,
    FP8_MODULES,
    IMAGES,
    INT4_BLOCKS,
    KNOWN_TYPES,
    Version,
)
from edgeprune.lint.rule import Finding, RuleContext
from edgeprune.lint.values import constant, is_constant

# Operator -> inputs that must have the same type; (): all. Pow is not listed because its exponent may differ.
_ONE_TYPE = "Add Concat Div Equal Gemm Greater GreaterOrEqual Less LessOrEqual MatMul Max Mean Min Mod Mul PRelu Range Sub Sum"
_SAME_TYPE: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(_ONE_TYPE.split(), ()),
    "ScatterElements": (0, 2),
    "ScatterND": (0, 2),
    "Where": (1, 2),
}
_UINT8_OPERATORS = ("Cast", "CastLike", "DequantizeLinear", "Identity", "Shape", "Size")

_SCALE, _ZERO_POINT = 1, 2
_FP4_SINCE: Version = (10, 8)


def lacking_types(context: RuleContext) -> Iterator[Finding]:
    """Find tensors of element types that TensorRT does not support."""
    for scope, value in _values(context):
        if value.element and value.element not in KNOWN_TYPES:
            reason = f"{value.name} is of {value.element}, which TensorRT does not have."
            remedy = (
                "Use INT4 with zero points of 0." if value.element == "UINT4" else "Cast to INT32, INT64 or FLOAT where it is made."
            )
            yield context.error(scope.producer(value.name) or value, reason, remedy)


def doubles(context: RuleContext) -> Iterator[Finding]:
    """Find where float64 is introduced: TensorRT silently computes it as float32."""
    reason = "TensorRT computes float64 as float32 without saying so."
    for scope, value in _values(context):
        if value.element in DOUBLES:
            node = scope.producer(value.name)
            if node is None or not any(node.input(index).element in DOUBLES for index in range(len(node.inputs))):
                yield context.warning(node or value, reason, "Cast to float32 yourself, or keep the values small enough for it.")


def inner_bytes(context: RuleContext) -> Iterator[Finding]:
    """Find UINT8 inside a network. TensorRT supports it only at inputs and outputs, next to a Cast."""
    borders = {value.name for value in context.graph.outputs}
    for node in context.graph.nodes:
        uint8_inputs = [value.name for value in map(node.input, range(len(node.inputs))) if value.element in IMAGES]
        if uint8_inputs and node.operator not in _UINT8_OPERATORS and node.operator != "QuantizeLinear":
            reason = f"{node.operator} computes on UINT8 ({uint8_inputs[0]}), which TensorRT takes at inputs and outputs alone."
            yield context.error(node, reason, "Cast it to INT32 or FLOAT16 first.")
        elif node.operator in ("Cast", "CastLike") and node.output().element in IMAGES and node.output().name not in borders:
            reason = f"{node.output().name} becomes UINT8 inside the network, which TensorRT takes at inputs and outputs alone."
            yield context.error(node, reason, "Cast to INT32 instead.")


def mixed_types(context: RuleContext) -> Iterator[Finding]:
    """Find nodes whose inputs must have the same type but do not; INT32 with INT64 is the usual case."""
    for node in context.graph.nodes:
        if node.operator in _SAME_TYPE:
            chosen = _SAME_TYPE[node.operator] or tuple(range(len(node.inputs)))
            elements = sorted({node.input(index).element for index in chosen} - {""})
            if len(elements) > 1:
                reason = f"{node.operator} is given {' and '.join(elements)}, and takes one type."
                yield context.error(node, reason, f"Cast its inputs to {_widest(node, chosen)}.")


def unusable_scales(context: RuleContext) -> Iterator[Finding]:
    """Find constant scales that are not finite, that divide by 0, and for TensorRT all that are not positive.

    TensorRT-RTX 1.7.1 refuses scales of INT8 that are 0, negative or NaN, and builds with an infinite one.
    """
    for node in _quantize_nodes(context):
        found = constant(node.scope, node.inputs[_SCALE])
        if found is None:
            continue
        scales = found.astype(np.float64)
        name, count = node.inputs[_SCALE], int((~np.isfinite(scales)).sum())
        if count:
            reason = f"{count} of {scales.size} scales in {name} are infinite or no numbers."
            yield context.error(node, reason, "Quantize finite weights, with scales that their type can hold.")
        elif (low := int((scales <= 0).sum())) and (context.target.tensorrt or node.operator == "QuantizeLinear"):
            reason = f"{low} of {scales.size} scales in {name} are 0 or less."
            yield context.error(node, reason, "Take a small positive scale for what is all zeros.")


def zero_points(context: RuleContext) -> Iterator[Finding]:
    """Find zero points that are not 0 or are computed at run time."""
    for node in _quantize_nodes(context):
        if not node.has_input(_ZERO_POINT) or _quantized_value(node).element in IMAGES:
            continue
        name = node.inputs[_ZERO_POINT]
        remedy = "Quantize symmetrically and leave the zero point out."
        if not is_constant(node.scope, name):
            yield context.error(node, f"The zero point {name} is computed, and TensorRT takes 0 alone.", remedy)
            continue
        found = constant(node.scope, name)
        if found is not None and bool((found != found.dtype.type(0)).any()):
            yield context.error(node, f"The zero point {name} is not 0, and TensorRT quantizes symmetrically.", remedy)


def unsigned_bytes(context: RuleContext) -> Iterator[Finding]:
    """Find quantization to UINT8, which TensorRT supports only on DLA."""
    for node in _quantize_nodes(context):
        if _quantized_value(node).element in IMAGES:
            yield context.error(
                node, f"TensorRT does not take {node.operator} of UINT8.", "Quantize to INT8 with a zero point of 0."
            )


def int4_blocks(context: RuleContext) -> Iterator[Finding]:
    """Find INT4 values that are not stored weights, and unsupported block sizes."""
    for node in _quantize_nodes(context):
        value = _quantized_value(node)
        if value.element != "INT4":
            continue
        if not is_constant(node.scope, node.inputs[0]):
            reason = "INT4 is computed here, and TensorRT documents it for weights alone."
            yield context.error(node, reason, "Store the INT4 weights as an initializer, or quantize activations to INT8.")
        size = int(node.attribute("block_size", 0))
        if size:
            yield from _check_blocks(context, node, value, size)


def dynamic_fp4(context: RuleContext) -> Iterator[Finding]:
    """Find quantizations of activations to FP4 that TensorRT's parser refuses (TensorRT-RTX 1.7.1): by blocks, or by the scale."""
    for node in context.graph.nodes:
        if node.proto.op_type != DYNAMIC_FP4:
            continue
        size, value, axis = int(node.attribute("block_size", 0)), node.input(0), int(node.attribute("axis", -1))
        length = value.shape[axis] if value.shape else None
        if size != FP4_BLOCK:
            reason = f"TensorRT's FP4 of activations has blocks of {FP4_BLOCK}, this node has {size}."
            yield context.error(node, reason, f"Quantize in blocks of {FP4_BLOCK}.")
        elif isinstance(length, int) and length % size:
            reason = f"Blocks of {size} do not divide the {length} elements of axis {axis}."
            yield context.error(node, reason, "Leave this product in FP16.")
        if not is_constant(node.scope, node.inputs[_SCALE]):
            reason = f"The scale {node.inputs[_SCALE]} is computed, and TensorRT takes an initializer alone."
            yield context.error(node, reason, "Store the scale that samples give.")


def small_floats(context: RuleContext) -> Iterator[Finding]:
    """Find FP8 and FP4 if the target or a Jetson does not support them; what a Jetson lacks is said once for each type."""
    said = set[str]()
    for node in _quantize_nodes(context):
        element = _quantized_value(node).element
        if element not in FP8 | FP4:
            continue
        if element in FP4 and context.tensorrt < _FP4_SINCE:
            yield context.error(node, f"TensorRT parses {element} since 10.8.", "Quantize to INT4.")
        able = FP4_MODULES if element in FP4 else FP8_MODULES
        unable = [module for module in context.modules if module not in able]
        if unable and element not in said:
            said.add(element)
            report = context.warning if set(context.modules) & able else context.error
            instead = "INT4" if element in FP4 else "INT8 or INT4"
            yield report(node, f"{' and '.join(unable)} cannot compute with {element}.", f"Quantize to {instead} there.")


def packed_borders(context: RuleContext) -> Iterator[Finding]:
    """Find network inputs and outputs in INT4, FP8 or FP4, which TensorRT supports only inside a network."""
    for value in (*context.graph.inputs, *context.graph.outputs):
        if value.element in FP8 | FP4 | {"INT4"}:
            reason = f"{value.name} crosses the border of the network as {value.element}, which TensorRT has inside alone."
            yield context.error(value, reason, "Dequantize inside the network, or make it an initializer.")


def _quantize_nodes(context: RuleContext) -> Iterator[Node]:
    return (node for node in context.graph.nodes if node.operator in ("QuantizeLinear", "DequantizeLinear"))


def _quantized_value(node: Node) -> Value:
    return node.output() if node.operator == "QuantizeLinear" else node.input(0)


def _check_blocks(context: RuleContext, node: Node, value: Value, size: int) -> Iterator[Finding]:
    axis = int(node.attribute("axis", 1))
    length = value.shape[axis] if value.shape is not None and -len(value.shape) <= axis < len(value.shape) else None
    if isinstance(length, int) and length % size:
        reason = f"Blocks of {size} do not divide the {length} elements of axis {axis}."
        yield context.error(node, reason, "Take a block size that divides the axis, or pad the weights.")
    if size not in INT4_BLOCKS:
        sizes = ", ".join(map(str, INT4_BLOCKS))
        yield context.error(
            node, f"TensorRT's INT4 has blocks of {sizes}, this node has {size}.", f"Quantize in blocks of {sizes}."
        )


def _values(context: RuleContext) -> Iterator[tuple[Scope, Value]]:
    for scope in context.graph.scopes:
        yield from ((scope, value) for value in scope.values.values())


def _widest(node: Node, chosen: tuple[int, ...]) -> str:
    elements = {node.input(index).element for index in chosen}
    order = ("INT64", "INT32", "FLOAT16", "BFLOAT16", "FLOAT")
    return next((element for element in order if element in elements), "one type")
