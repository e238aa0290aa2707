"""Attention of vision encoders for CPUs, in tiles of heads and rows.

The scores of an encoder with 2,916 patches and 16 heads take 544 MB, twice. Tiles that fit the CPU's cache avoid main memory.
Measured with ONNX Runtime 1.31 on two cores, 16 heads of size 80 (ms per layer): untiled 299, six row blocks 277, four tiles of
four heads 250, one head per tile 241.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeprune.export.passes.replacement import only_consumer, replace_nodes

_PIECE = 16 << 20  # bytes of scores per tile of whole heads
_HEAD = 64 << 20  # bytes of scores of one head above which it is split into row blocks
_FLOAT = 4  # bytes


def tile_encoder_attention(graph: ir.Graph) -> None:
    """Split MatMul, Softmax and MatMul into tiles of at most 16 MB of scores or one head, and heads above 64 MB into row blocks."""
    for node in list(graph):
        if node.op_type != "Softmax":
            continue
        scores, weights = node.inputs[0], node.outputs[0]
        assert scores is not None
        first, last = scores.producer(), only_consumer(weights)
        if first is None or last is None or (first.op_type, last.op_type) != ("MatMul", "MatMul") or last.inputs[0] is not weights:
            continue
        shape = [size for size in scores.shape or () if isinstance(size, int)]
        if only_consumer(scores) is not node or scores.shape is None or len(shape) < len(scores.shape):
            continue
        heads = next((axis for axis, size in enumerate(shape[:-2]) if size > 1), 0)
        pieces = min(shape[heads], math.ceil(_FLOAT * math.prod(shape) / _PIECE))
        blocks = math.ceil(_FLOAT * math.prod(shape) / pieces / _HEAD)
        if pieces * blocks > 1:
            _TiledAttention(graph, (first, node, last)).write(
                heads, _split_sizes(shape[heads], pieces), _split_sizes(shape[-2], blocks)
            )


def _split_sizes(count: int, parts: int) -> list[int]:
    return [len(part) for part in np.array_split(np.arange(count), parts)]


class _TiledAttention:
    def __init__(self, graph: ir.Graph, nodes: tuple[ir.Node, ir.Node, ir.Node]) -> None:
        self._graph, self._nodes, self._tape = graph, nodes, Tape()

    def write(self, heads: int, pieces: list[int], blocks: list[int]) -> None:
        first, softmax, last = self._nodes
        (query, keys), values, output = first.inputs, last.inputs[1], last.outputs[0]
        assert query is not None and query.shape is not None and keys is not None and values is not None
        rows, axis = len(query.shape) - 2, softmax.attributes["axis"].as_int()
        mixed = []
        for group in zip(
            self._split(query, heads, pieces), self._keys(keys, heads, pieces), self._split(values, heads, pieces), strict=True
        ):
            scores = [self._tape.op("MatMul", [part, group[1]]) for part in self._split(group[0], rows, blocks)]
            weights = [self._tape.op("Softmax", [part], {"axis": axis}) for part in scores]
            mixed.append(self._concat([self._tape.op("MatMul", [part, group[2]]) for part in weights], rows))
        joined = self._concat(mixed, heads)
        replace_nodes(self._graph, last, [last, softmax, first], self._tape, {output: joined})

    def _keys(self, keys: ir.Value, axis: int, sizes: list[int]) -> list[ir.Value]:
        # Split before the transpose, so that each transpose stays next to its product and fuses with it.
        producer = keys.producer()
        perm = list(producer.attributes["perm"].as_ints()) if producer is not None and producer.op_type == "Transpose" else []
        if producer is None or not perm or producer.inputs[0] is None:
            return self._split(keys, axis, sizes)
        return [self._tape.op("Transpose", [part], {"perm": perm}) for part in self._split(producer.inputs[0], perm[axis], sizes)]

    def _split(self, value: ir.Value, axis: int, sizes: list[int]) -> list[ir.Value]:
        if len(sizes) == 1:
            return [value]
        name = f"{self._nodes[0].name}.{len(self._tape.initializers)}"
        split = self._tape.initializer(ir.tensor(np.array(sizes, np.int64), name=name))
        return list(self._tape.op_multi_out("Split", [value, split], {"axis": axis}, num_outputs=len(sizes)))

    def _concat(self, parts: list[ir.Value], axis: int) -> ir.Value:
        return parts[0] if len(parts) == 1 else self._tape.op("Concat", parts, {"axis": axis})
