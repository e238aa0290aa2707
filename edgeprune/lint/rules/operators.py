"""Rules on operators: whether the target's engine supports them, by opset, element type and rank.

The Attention operator of opset 23 has its own rule: TensorRT supports parts of it since 10.14.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from edgeprune.lint.graph import Graph, Node, Value
from edgeprune.lint.operator_support import (
    DOUBLES,
    IMAGES,
    INSTEAD,
    INTEGERS,
    KNOWN_TYPES,
    LARGEST_RANK,
    LISTED,
    MOVERS,
    NEWEST_ONNXRUNTIME_OPSET,
    OPERATORS,
    OWN_OPERATORS,
    QUANTIZED,
    RUN,
    TYPED_INPUT,
    Support,
    Version,
    newest_opset,
)
from edgeprune.lint.rule import Finding, RuleContext

_REWRITE = "Rewrite the model without it, or pick a target that has it."
_ONNXRUNTIME_DOMAINS = ("", "ai.onnx", "com.microsoft")
_INT4_OPSET = 21

_QUERY, _VALUE, _MASK, _PAST_KEY, _PAST_VALUE = 0, 2, 3, 4, 5


def unreadable_shapes(context: RuleContext) -> Iterator[Finding]:
    """Find a graph whose types and shapes ONNX cannot infer, which limits the other rules."""
    if context.graph.unread:
        reason = f"Types and shapes cannot be inferred: {context.graph.unread}."
        yield context.warning(context.graph.name, reason, "Check the graph with onnx.checker and export it again.")


def foreign_operators(context: RuleContext) -> Iterator[Finding]:
    """Find operators that are not part of ONNX and that ONNX Runtime may lack."""
    for node in context.graph.nodes:
        if node.proto.domain not in _ONNXRUNTIME_DOMAINS or (node.standard and not onnx.defs.has(node.operator)):
            reason = f"{node.operator} is no operator of ONNX."
            yield context.warning(node, reason, "Register the library that has it with ONNX Runtime.")


def newer_onnxruntime_opset(context: RuleContext) -> Iterator[Finding]:
    """Find an opset that the oldest supported ONNX Runtime cannot read."""
    if context.graph.opset > NEWEST_ONNXRUNTIME_OPSET:
        reason = f"Opset {context.graph.opset} is newer than {NEWEST_ONNXRUNTIME_OPSET}, which ONNX Runtime 1.20 reads."
        yield context.warning(
            context.graph.name, reason, "Install a newer onnxruntime on the device, or export with a lower opset."
        )


def unknown_operators(context: RuleContext) -> Iterator[Finding]:
    """Find operators that the target's TensorRT does not parse."""
    for node in context.graph.nodes:
        since = _since(node)
        if since is None:
            remedy = INSTEAD.get(node.proto.op_type, _REWRITE if node.standard else f"{_REWRITE[:-1]}, or load a plugin for it.")
            yield context.error(node, f"TensorRT has no {node.operator}.", remedy)
        elif since > context.tensorrt:
            reason = f"TensorRT parses {node.operator} since {_dotted(since)}, the target has {_dotted(context.tensorrt)}."
            remedy = f"Export for {context.target.name}, which decomposes it." if not context.target.fused else _REWRITE
            yield context.error(node, reason, remedy)


def newer_opset(context: RuleContext) -> Iterator[Finding]:
    """Find an opset that the target's TensorRT does not read.

    INT4 needs opset 21, which every target's TensorRT reads. Without INT4, opset 21 is not documented for the oldest.
    """
    graph = context.graph
    newest = newest_opset(context.tensorrt)
    if graph.opset <= newest or (graph.opset == _INT4_OPSET and _has_int4(graph)):
        return
    report = context.warning if graph.opset == _INT4_OPSET else context.error
    reason = f"Opset {graph.opset} is newer than {newest}, the last that TensorRT {_dotted(context.tensorrt)} is known to read."
    yield report(graph.name, reason, f"Export with opset {newest} or lower.")


def unlisted_types(context: RuleContext) -> Iterator[Finding]:
    """Find operators on element types that TensorRT does not support for them. `lacking_types` finds types it never supports."""
    for node in context.graph.nodes:
        support = OPERATORS.get(node.operator)
        element = _typed_value(node).element
        element = "FLOAT" if element in DOUBLES else element
        if support is None or element in support.types or element not in KNOWN_TYPES - IMAGES:
            continue
        if element in support.newer:
            if context.tensorrt < RUN:
                reason = f"TensorRT {_dotted(LISTED)} does not list {node.operator} on {element}; {_dotted(RUN)} takes it."
                yield context.warning(node, reason, _cast_advice(support))
        elif element in QUANTIZED:
            yield from _check_quantized(context, node, support, element)
        else:
            yield context.error(node, f"TensorRT does not take {node.operator} on {element}.", _cast_advice(support))


def high_ranks(context: RuleContext) -> Iterator[Finding]:
    """Find tensors with more dimensions than TensorRT supports."""
    for scope in context.graph.scopes:
        for value in scope.values.values():
            if value.shape is not None and len(value.shape) > LARGEST_RANK:
                reason = f"{value.name} has {len(value.shape)} dimensions, TensorRT has {LARGEST_RANK}."
                yield context.error(scope.producer(value.name) or value, reason, "Merge dimensions with Reshape.")


def partial_attention(context: RuleContext) -> Iterator[Finding]:
    """Find Attention nodes with features that TensorRT lacks. `unknown_operators` handles versions without Attention."""
    if context.tensorrt < OPERATORS["Attention"].since:
        return
    for node in context.graph.nodes:
        if node.operator != "Attention":
            continue
        for reason, remedy in _refused_features(node):
            yield context.error(node, reason, remedy)
        if node.input(_QUERY).element == "FLOAT":
            reason = "TensorRT has few kernels for Attention on FLOAT, and refuses to build a node for which it has none."
            yield context.warning(node, reason, "Cast queries, keys and values to FLOAT16 or BFLOAT16.")


def _has_int4(graph: Graph) -> bool:
    return any(value.element == "INT4" for scope in graph.scopes for value in scope.values.values())


def _since(node: Node) -> Version | None:
    if node.proto.op_type in OWN_OPERATORS and not node.standard:
        return OWN_OPERATORS[node.proto.op_type]
    return OPERATORS[node.operator].since if node.operator in OPERATORS else None


def _typed_value(node: Node) -> Value:
    index = TYPED_INPUT.get(node.operator, 0)
    return node.output() if index is None else node.input(index)


def _check_quantized(context: RuleContext, node: Node, support: Support, element: str) -> Iterator[Finding]:
    remedy = "Put DequantizeLinear before the node."
    if node.operator in MOVERS:
        return
    if element == "INT8" and support.types >= INTEGERS:
        yield context.warning(
            node, f"TensorRT documents INT8 for QuantizeLinear and DequantizeLinear, not for {node.operator}.", remedy
        )
    else:
        yield context.error(node, f"TensorRT does not take {node.operator} on {element}.", remedy)


def _cast_advice(support: Support) -> str:
    types = ", ".join(sorted(support.types))
    return f"Cast its input to one of {types} and the result back."


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def _refused_features(node: Node) -> Iterator[tuple[str, str]]:
    if node.has_input(_PAST_KEY) or node.has_input(_PAST_VALUE):
        yield (
            "TensorRT does not take past_key and past_value of Attention.",
            "Concatenate the cache with the new keys and values before the node.",
        )
    if any(node.outputs[1:]):
        yield "TensorRT computes one output of Attention.", "Output the concatenated keys and values in place of the present ones."
    if node.attribute("is_causal", 0) and node.has_input(_MASK):
        yield "TensorRT does not take is_causal of Attention together with a mask.", "Put the causal part into the mask."
    if node.attribute("softcap", 0.0):
        yield "TensorRT does not take softcap of Attention.", "Write the attention as MatMul, Tanh and Softmax."
    if node.attribute("softmax_precision") is not None:
        yield "TensorRT does not take softmax_precision of Attention.", "Leave softmax_precision out."
    query, value = (_head_size(node, index) for index in (_QUERY, _VALUE))
    if query != value and query and value:
        yield (
            f"TensorRT takes values as wide as queries, these heads have {value} and {query}.",
            "Pad the narrower heads with zeros.",
        )


def _head_size(node: Node, index: int) -> int:
    # Shape is [batch, heads, length, size] or [batch, length, heads * size]; 0 if unknown.
    shape = node.input(index).shape
    if shape is None or not isinstance(shape[-1], int):
        return 0
    heads = node.attribute("q_num_heads" if index == _QUERY else "kv_num_heads", 1) if len(shape) == 3 else 1
    return shape[-1] // int(heads)


def quantized_weights_beside_loops(context: RuleContext) -> Iterator[Finding]:
    """Find quantized weights in a graph with a loop, which the builder of TensorRT-RTX 1.7.1 fails on (bb.cpp:137)."""
    operators = {node.operator for node in context.graph.nodes}
    node = next((node for node in context.graph.nodes if node.operator == "DequantizeLinear"), None)
    if node is not None and operators & {"Loop", "Scan"}:
        reason = "The graph has a loop beside quantized weights, which TensorRT may fail to build."
        yield context.warning(node, reason, "Export it with --precision fp16 if it does.")
