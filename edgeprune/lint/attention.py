"""Rules on the Attention operator of opset 23, of which TensorRT parses a part since 10.14."""

from __future__ import annotations

from collections.abc import Iterator

from edgeprune.lint.facts import OPERATORS
from edgeprune.lint.findings import Finding
from edgeprune.lint.graphs import Node
from edgeprune.lint.subject import Subject

_QUERY, _VALUE, _MASK, _PAST_KEY, _PAST_VALUE = 0, 2, 3, 4, 5


def partial_attention(subject: Subject) -> Iterator[Finding]:
    """Find Attention nodes that use what TensorRT leaves out; where it has no Attention at all, that is another rule's."""
    if subject.tensorrt < OPERATORS["Attention"].since:
        return
    for node in subject.graph.nodes:
        if node.operator != "Attention":
            continue
        for reason, remedy in _refused(node):
            yield subject.error(node, reason, remedy)
        if node.input(_QUERY).element == "FLOAT":
            reason = "TensorRT has few kernels for Attention on FLOAT, and refuses to build a node for which it has none."
            yield subject.warning(node, reason, "Cast queries, keys and values to FLOAT16 or BFLOAT16.")


def _refused(node: Node) -> Iterator[tuple[str, str]]:
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
    # Of [batch, heads, length, size] or [batch, length, heads * size]; 0 where it is not known.
    shape = node.input(index).shape
    if shape is None or not isinstance(shape[-1], int):
        return 0
    heads = node.attribute("q_num_heads" if index == _QUERY else "kv_num_heads", 1) if len(shape) == 3 else 1
    return shape[-1] // int(heads)
