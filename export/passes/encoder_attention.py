"""Attention of vision encoders for CPUs: ONNX Runtime's MultiHeadAttention.

It goes through queries and keys in blocks that fit the CPU's caches, and never holds all scores: those of an encoder with 2,916
patches and 16 heads take 544 MB. Measured with ONNX Runtime 1.31, one thread (ms per layer; products of at most 16 MB of scores,
MultiHeadAttention): 5 views of 1,024 patches, 12 heads of 64: 166, 149; 2,916 patches, 16 heads of 80: 473, 356.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeprune.export.passes.fusion import MICROSOFT, before_reshapes
from edgeprune.export.passes.replacement import only_consumer, replace_nodes, reshaped, sizes_of

_TURN = [0, 2, 1, 3]  # [views, patches, heads, head_dim] to [views, heads, patches, head_dim], and back


def fuse_encoder_attention(graph: ir.Graph) -> None:
    """Replace MatMul, Softmax and MatMul by MultiHeadAttention where nothing is added to the scores and nothing else reads them."""
    for node in list(graph):
        if node.op_type == "Softmax" and (found := _match(node)) is not None:
            _replace(graph, found)
            graph.opset_imports[MICROSOFT] = 1


@dataclass(frozen=True)
class _Attention:
    # The nodes from scores to output, and queries, keys and values [..., patches, head_dim].
    nodes: tuple[ir.Node, ir.Node, ir.Node]
    query: ir.Value
    keys: ir.Value  # [..., head_dim, patches]
    values: ir.Value


def _match(softmax: ir.Node) -> _Attention | None:
    scores, weights = softmax.inputs[0], softmax.outputs[0]
    assert scores is not None
    first, last = scores.producer(), only_consumer(weights)
    if first is None or last is None or (first.op_type, last.op_type) != ("MatMul", "MatMul") or last.inputs[0] is not weights:
        return None
    query, keys, values = first.inputs[0], first.inputs[1], last.inputs[1]
    assert query is not None and keys is not None and values is not None
    shapes = [sizes_of(value) for value in (query, keys, values)]
    if only_consumer(scores) is not softmax or not all(shapes) or len({shape[:-2] for shape in shapes}) > 1:
        return None
    return _Attention((last, softmax, first), query, keys, values)


def _replace(graph: ir.Graph, found: _Attention) -> None:
    tape, (last, *_) = Tape(), found.nodes
    name, output = str(last.name), last.outputs[0]
    turn = only_consumer(output)
    query, scale = _unscaled(tape, found.query, name)
    sources = [_turned(value, perm) for value, perm in ((query, _TURN), (found.keys, [0, 2, 3, 1]), (found.values, _TURN))]
    if turn is not None and turn.op_type == "Transpose" and list(turn.attributes["perm"].as_ints()) == _TURN and all(sources):
        # Heads lie beside each other, as they come from the products and as the next one takes them.
        heads, removed, output = sizes_of(found.query)[1], [turn, *found.nodes], turn.outputs[0]
        parts = [(source, (*sizes_of(source)[:2], math.prod(sizes_of(source)[2:]))) for source in sources if source is not None]
    else:
        heads, removed = 1, list(found.nodes)
        rows = (query, _untransposed(tape, found.keys), found.values)
        parts = [(value, (math.prod(sizes_of(value)[:-2]), *sizes_of(value)[-2:])) for value in rows]
    inputs = [reshaped(tape, value, shape, f"{name}.{index}") for index, (value, shape) in enumerate(parts)]
    mixed = tape.op("MultiHeadAttention", inputs, {"num_heads": heads, "scale": scale}, domain=MICROSOFT)
    mixed.type, mixed.shape = output.type, inputs[0].shape
    replace_nodes(graph, removed[0], removed, tape, {output: reshaped(tape, mixed, sizes_of(output), f"{name}.output")})


def _unscaled(tape: Tape, query: ir.Value, name: str) -> tuple[ir.Value, float]:
    # The queries before they were multiplied by a constant, and that.
    product = before_reshapes(query).producer()
    if product is None or product.op_type != "Mul":
        return query, 1.0
    for value, factor in (product.inputs, product.inputs[::-1]):
        number = factor.const_value if factor is not None else None
        if value is not None and number is not None and number.size == 1:
            return reshaped(tape, value, sizes_of(query), f"{name}.query"), float(number.numpy().item())
    return query, 1.0


def _turned(value: ir.Value, perm: Sequence[int]) -> ir.Value | None:
    # What a Transpose of this order made into the value, if one did.
    node = value.producer()
    if node is None or node.op_type != "Transpose" or list(node.attributes["perm"].as_ints()) != list(perm):
        return None
    return node.inputs[0]


def _untransposed(tape: Tape, keys: ir.Value) -> ir.Value:
    # Keys [..., head_dim, patches] as [..., patches, head_dim].
    producer, sizes = keys.producer(), sizes_of(keys)
    source, perm = keys, list(range(len(sizes)))
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        source, perm = producer.inputs[0], list(producer.attributes["perm"].as_ints())
    perm[-2:] = perm[:-3:-1]
    if perm == sorted(perm):
        return source
    turned = tape.op("Transpose", [source], {"perm": perm})
    turned.type, turned.shape = keys.type, ir.Shape([*sizes[:-2], sizes[-1], sizes[-2]])
    return turned
