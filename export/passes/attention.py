"""Attention for CPUs: expand the decoder's BlockedAttention nodes, and tile the vision encoder's attention by heads.

A BlockedAttention node becomes an If with two branches: attention in one piece, or in blocks of query rows. Measured with ONNX
Runtime 1.31 on one AVX512 core, 769 tokens, GQA with 14 query and 2 KV heads of size 64 (ms per layer): concatenated scores 49,
concatenated keys 39, Attention-23 29, GroupQueryAttention 28, eight blocks 31, eight blocks up to the last visible key 17.

The scores of an encoder with 2,916 patches and 16 heads take 544 MB, twice. Tiles that fit the CPU's cache avoid main memory.
Measured with ONNX Runtime 1.31 on two cores, 16 heads of size 80 (ms per layer): untiled 299, six row blocks 277, four tiles of
four heads 250, one head per tile 241.
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
KV_PREFIXES = ("past_text_", "", "past_visual_")  # name prefixes of keys and values
MIN_BLOCKED_LENGTH = 64  # shorter steps attend in one piece: their scores are small, and caches are read without a copy
_PIECE = 16 << 20  # bytes of scores per tile of whole heads
_HEAD = 64 << 20  # bytes of scores of one head above which it is split into row blocks
_FLOAT = 4  # bytes


def expand_blocked(graph: ir.Graph) -> None:
    """Replace every BlockedAttention node by standard ONNX operators."""
    constants: dict[tuple[int, ...], ir.Value] = {}
    for node in list(graph):
        if (node.domain, node.op_type) != (DOMAIN, OPERATOR):
            continue
        inputs = {name: value for name, value in zip(INPUTS, node.inputs, strict=True) if value is not None}
        tape, output = Tape(), node.outputs[0]
        single = _Branch(f"{node.name}_whole", graph, constants)
        blocks = _Branch(f"{node.name}_blocks", graph, constants)
        length = tape.op("Shape", [inputs["query"]], {"start": 2, "end": 3})
        short = tape.op("Less", [length, single.constant(MIN_BLOCKED_LENGTH)])
        branches = {
            "then_branch": single.graph(single.attend(inputs), output),
            "else_branch": blocks.graph(_attend_in_blocks(blocks, inputs), output),
        }
        value = tape.op("If", [short], branches)
        replace_nodes(graph, node, [node], tape, {output: value})


class _Branch:
    # Builds the subgraph of one branch. Value names carry its prefix, because names of the outer graph are visible inside.
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
        # Like attention._mixed: separate key segments with concatenated scores. No key is expanded or copied.
        query = inputs["query"]
        assert query.shape is not None
        heads, group, width = (_static(query.shape[axis]) for axis in (0, 1, 3))
        rows = self.op("Reshape", query, self.constant(heads, -1, width))
        keys, values = ([inputs[f"{prefix}{kind}"] for prefix in KV_PREFIXES] for kind in ("key", "value"))
        joined = self.op("Concat", *(self.op("MatMul", rows, self.op("Transpose", key, perm=[1, 2, 0])) for key in keys), axis=2)
        shape = self.op("Concat", self.constant(heads, group), self.op("Shape", inputs["mask"]), axis=0)
        scores = self.op("Add", self.op("Reshape", joined, shape), inputs["mask"])
        weights = self.op("Reshape", self.op("Softmax", scores, axis=-1), self.op("Shape", joined))
        # Lengths come from the untransposed keys: a Shape of the transposes would prevent their fusion into the products.
        lengths = self.op("Concat", *(self.op("Shape", key, start=0, end=1) for key in keys), axis=0)
        parts = self.op_multi("Split", 3, weights, lengths, axis=2)
        mixed = [
            self.op("MatMul", part, self.op("Transpose", value, perm=[1, 0, 2])) for part, value in zip(parts, values, strict=True)
        ]
        return self.op("Reshape", self.op("Add", self.op("Add", mixed[0], mixed[1]), mixed[2]), self.op("Shape", query))


def _static(size: object) -> int:
    assert isinstance(size, int)
    return size


def _attend_in_blocks(branch: _Branch, inputs: dict[str, ir.Value]) -> ir.Value:
    query, mask, reach = (inputs[name] for name in ("query", "mask_in_row", "reach"))
    # Concatenated keys [KV heads, 1, head_dim, n] and values [KV heads, 1, n, head_dim], broadcast over the heads of a group.
    one = branch.constant(1)
    keys = branch.op("Unsqueeze", branch.op("Transpose", _concat_tokens(branch, inputs, "key"), perm=[1, 2, 0]), one)
    values = branch.op("Unsqueeze", branch.op("Transpose", _concat_tokens(branch, inputs, "value"), perm=[1, 0, 2]), one)
    length = branch.op("Shape", query, start=2, end=3)
    past = branch.op("Sub", branch.op("Shape", mask, start=1, end=2), length)
    edges = [
        branch.op("Div", branch.op("Mul", length, branch.constant(block)), branch.constant(BLOCKS)) for block in range(BLOCKS + 1)
    ]
    mixed, zero = [], branch.constant(0)
    for start, end in pairwise(edges):
        visible = branch.op("Add", past, branch.op("ReduceMax", branch.slice(reach, start, end, 0), keepdims=1))
        scores = branch.op("MatMul", branch.slice(query, start, end, 2), branch.slice(keys, zero, visible, 3))
        bias = branch.slice(branch.slice(mask, start, end, 0), zero, visible, 1)
        weights = branch.op("Softmax", branch.op("Add", scores, bias), axis=-1)
        mixed.append(branch.op("MatMul", weights, branch.slice(values, zero, visible, 2)))
    return branch.op("Concat", *mixed, axis=2)


def _concat_tokens(branch: _Branch, inputs: dict[str, ir.Value], kind: str) -> ir.Value:
    # Cached visual tokens and cached text without their null rows, then this step's tokens [n, KV heads, head_dim].
    cached = [
        branch.slice(inputs[f"{prefix}{kind}"], branch.constant(1), branch.constant(1 << 40), 0)
        for prefix in ("past_visual_", "past_text_")
    ]
    return branch.op("Concat", *cached, inputs[kind], axis=0)


def tile_encoder_attention(graph: ir.Graph) -> None:
    """Split MatMul, Softmax and MatMul into tiles of at most 16 MB of scores or one head, and heads above 64 MB into row blocks."""
    for node in list(graph):
        if node.op_type != "Softmax":
            continue
        scores, weights = node.inputs[0], node.outputs[0]
        assert scores is not None
        first, last = scores.producer(), _only_consumer(weights)
        if first is None or last is None or (first.op_type, last.op_type) != ("MatMul", "MatMul") or last.inputs[0] is not weights:
            continue
        shape = [size for size in scores.shape or () if isinstance(size, int)]
        if _only_consumer(scores) is not node or scores.shape is None or len(shape) < len(scores.shape):
            continue
        heads = next((axis for axis, size in enumerate(shape[:-2]) if size > 1), 0)
        pieces = min(shape[heads], math.ceil(_FLOAT * math.prod(shape) / _PIECE))
        blocks = math.ceil(_FLOAT * math.prod(shape) / pieces / _HEAD)
        if pieces * blocks > 1:
            _TiledAttention(graph, (first, node, last)).write(
                heads, _split_sizes(shape[heads], pieces), _split_sizes(shape[-2], blocks)
            )


def _only_consumer(value: ir.Value) -> ir.Node | None:
    consumers = value.consumers()
    return consumers[0] if len(consumers) == 1 and not value.is_graph_output() else None


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
