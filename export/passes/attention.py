"""Attention for CPUs: expand the BlockedAttention nodes of a decoder, and split the attention of an encoder by heads.

A BlockedAttention node becomes an If whose branches attend in one piece, or row block by row block. Measured with ONNX Runtime
1.31 on one AVX512 core, 769 tokens, 14 heads on 2 of 64 (ms a layer): parts joined at the scores 49, keys joined 39, Attention-23
29, GroupQueryAttention 28, eight blocks 31, eight blocks that end with the last visible key 17.

The scores of an encoder with 2,916 patches and 16 heads are 544 MB, twice. Pieces that fit the CPU's cache need not go to memory.
Measured with ONNX Runtime 1.31 on two cores, 16 heads of 80 (ms a layer): whole 299, six blocks of rows 277, four times four
heads 250, head by head 241.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeprune.export.passes.replacement import replace_nodes
from edgeprune.model.attention import DOMAIN, INPUTS, OPERATOR

BLOCKS = 8
PLACES = ("past_text_", "", "past_visual_")  # of keys and values, as their names begin
SHORT = 64  # steps of fewer tokens attend in one piece: their scores are small, and the caches are read where they are

_PIECE = 16 << 20  # bytes of scores at once, as far as whole heads go
_HEAD = 64 << 20  # bytes of scores of one head, of which there are then blocks of rows
_FLOAT = 4


def expand_blocked(graph: ir.Graph) -> None:
    """Replace every BlockedAttention by what ONNX has."""
    constants: dict[tuple[int, ...], ir.Value] = {}
    for node in list(graph):
        if (node.domain, node.op_type) != (DOMAIN, OPERATOR):
            continue
        inputs = {name: value for name, value in zip(INPUTS, node.inputs, strict=True) if value is not None}
        tape, output = Tape(), node.outputs[0]
        whole = _Branch(f"{node.name}_whole", graph, constants)
        blocks = _Branch(f"{node.name}_blocks", graph, constants)
        length = tape.op("Shape", [inputs["query"]], {"start": 2, "end": 3})
        short = tape.op("Less", [length, whole.constant(SHORT)])
        branches = {
            "then_branch": whole.graph(whole.attend(inputs), output),
            "else_branch": blocks.graph(_in_blocks(blocks, inputs), output),
        }
        value = tape.op("If", [short], branches)
        replace_nodes(graph, node, [node], tape, {output: value})


class _Branch:
    # A subgraph being written. Its names begin with its own, as those of the graph around it are visible inside.
    def __init__(self, name: str, graph: ir.Graph, constants: dict[tuple[int, ...], ir.Value]) -> None:
        self._name, self._graph, self._constants = name, graph, constants
        self._tape = Tape()

    def op(self, kind: str, *inputs: ir.Value, **attributes: int | Sequence[int]) -> ir.Value:
        (value,) = self.op_multi(kind, 1, *inputs, **attributes)
        return value

    def op_multi(self, kind: str, outputs: int, *inputs: ir.Value, **attributes: int | Sequence[int]) -> Sequence[ir.Value]:
        number = len(self._tape.nodes)
        values = [ir.Value(name=f"{self._name}_{number}_{output}") for output in range(outputs)]
        self._tape.op_multi_out(kind, inputs, attributes, outputs=values, name=f"{self._name}_{number}")
        return values

    def constant(self, *numbers: int) -> ir.Value:
        if numbers not in self._constants:
            name = "blocked_" + "_".join(map(str, numbers)).replace("-", "m")
            value = ir.Value(
                name=name, const_value=ir.tensor(np.array(numbers, np.int64), name=name), type=ir.TensorType(ir.DataType.INT64)
            )
            value.shape = ir.Shape([len(numbers)])
            self._graph.register_initializer(value)
            self._constants[numbers] = value
        return self._constants[numbers]

    def slice(self, value: ir.Value, start: ir.Value, end: ir.Value, axis: int) -> ir.Value:
        return self.op("Slice", value, start, end, self.constant(axis))

    def graph(self, result: ir.Value, like: ir.Value) -> ir.Graph:
        result.type, result.shape = like.type, like.shape
        return ir.Graph([], [result], nodes=list(self._tape.nodes), name=self._name)

    def attend(self, inputs: dict[str, ir.Value]) -> ir.Value:
        # As attention._mixed: parts of keys apart, their scores in one row. No key is expanded or copied.
        query = inputs["query"]
        assert query.shape is not None
        heads, group, width = (_known(query.shape[axis]) for axis in (0, 1, 3))
        rows = self.op("Reshape", query, self.constant(heads, -1, width))
        keys, values = ([inputs[f"{place}{kind}"] for place in PLACES] for kind in ("key", "value"))
        joined = self.op("Concat", *(self.op("MatMul", rows, self.op("Transpose", key, perm=[1, 2, 0])) for key in keys), axis=2)
        shape = self.op("Concat", self.constant(heads, group), self.op("Shape", inputs["mask"]), axis=0)
        scores = self.op("Add", self.op("Reshape", joined, shape), inputs["mask"])
        weights = self.op("Reshape", self.op("Softmax", scores, axis=-1), self.op("Shape", joined))
        # Not of the transposed keys: those are part of the products, and would have to be written for their shape.
        lengths = self.op("Concat", *(self.op("Shape", key, start=0, end=1) for key in keys), axis=0)
        parts = self.op_multi("Split", 3, weights, lengths, axis=2)
        mixed = [
            self.op("MatMul", part, self.op("Transpose", value, perm=[1, 0, 2])) for part, value in zip(parts, values, strict=True)
        ]
        return self.op("Reshape", self.op("Add", self.op("Add", mixed[0], mixed[1]), mixed[2]), self.op("Shape", query))


def _known(size: object) -> int:
    assert isinstance(size, int)
    return size


def _in_blocks(branch: _Branch, inputs: dict[str, ir.Value]) -> ir.Value:
    query, mask, reach = (inputs[name] for name in ("query", "mask_in_row", "reach"))
    # Keys [kv heads, 1, head_dim, n] and values [kv heads, 1, n, head_dim] in one row; every head of a group meets the same.
    one = branch.constant(1)
    keys = branch.op("Unsqueeze", branch.op("Transpose", _row_of(branch, inputs, "key"), perm=[1, 2, 0]), one)
    values = branch.op("Unsqueeze", branch.op("Transpose", _row_of(branch, inputs, "value"), perm=[1, 0, 2]), one)
    length = branch.op("Shape", query, start=2, end=3)
    past = branch.op("Sub", branch.op("Shape", mask, start=1, end=2), length)
    edges = [
        branch.op("Div", branch.op("Mul", length, branch.constant(block)), branch.constant(BLOCKS)) for block in range(BLOCKS + 1)
    ]
    mixed, zero = [], branch.constant(0)
    for start, end in pairwise(edges):
        seen = branch.op("Add", past, branch.op("ReduceMax", branch.slice(reach, start, end, 0), keepdims=1))
        scores = branch.op("MatMul", branch.slice(query, start, end, 2), branch.slice(keys, zero, seen, 3))
        added = branch.slice(branch.slice(mask, start, end, 0), zero, seen, 1)
        weights = branch.op("Softmax", branch.op("Add", scores, added), axis=-1)
        mixed.append(branch.op("MatMul", weights, branch.slice(values, zero, seen, 2)))
    return branch.op("Concat", *mixed, axis=2)


def _row_of(branch: _Branch, inputs: dict[str, ir.Value], kind: str) -> ir.Value:
    # Earlier visual tokens and earlier text without their null rows, and this step's tokens [n, kv heads, head_dim].
    earlier = [
        branch.slice(inputs[f"{place}{kind}"], branch.constant(1), branch.constant(1 << 40), 0)
        for place in ("past_visual_", "past_text_")
    ]
    return branch.op("Concat", *earlier, inputs[kind], axis=0)


def tile_encoder_attention(graph: ir.Graph) -> None:
    """Replace MatMul, Softmax and MatMul of large scores by as many of each as bring those to 16 MB, or one head."""
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
        heads = next((axis for axis, size in enumerate(shape[:-2]) if size > 1), 0)
        pieces = min(shape[heads], math.ceil(_FLOAT * math.prod(shape) / _PIECE))
        blocks = math.ceil(_FLOAT * math.prod(shape) / pieces / _HEAD)
        if pieces * blocks > 1:
            _Tiling(graph, (first, node, last)).write(heads, _parts(shape[heads], pieces), _parts(shape[-2], blocks))


def _only(value: ir.Value) -> ir.Node | None:
    users = value.consumers()
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def _parts(count: int, parts: int) -> list[int]:
    return [len(part) for part in np.array_split(np.arange(count), parts)]


class _Tiling:
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
        # A transposition stays beside its product, which takes it in.
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
