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
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeprune.export.passes.replacement import replace_nodes
from edgeprune.model.attention import DOMAIN, INPUTS, OPERATOR

BLOCKS = 8
KV_PREFIXES = ("past_text_", "", "past_visual_")  # name prefixes of keys and values
MIN_BLOCKED_LENGTH = 64  # shorter steps attend in one piece: their scores are small, and caches are read without a copy
_ROW = "_one_row"  # the end of the name of a branch
_PIECE = 16 << 20  # bytes of scores per tile of whole heads
_HEAD = 64 << 20  # bytes of scores of one head above which it is split into row blocks
_FLOAT = 4  # bytes


def expand_blocked(graph: ir.Graph) -> None:
    """Replace every BlockedAttention node by standard ONNX operators, with what brings its queries and output into shape."""
    shared = _Shared(graph)
    for node in list(graph):
        if (node.domain, node.op_type) == (DOMAIN, OPERATOR):
            _expand(graph, node, shared)


def one_row_branch(node: ir.Node) -> ir.Graph | None:
    """Return the branch of an expanded attention that one row of queries takes, None for any other node."""
    graph = node.attributes["then_branch"].as_graph() if node.op_type == "If" else None
    return graph if graph is not None and str(graph.name).endswith(_ROW) else None


def _expand(graph: ir.Graph, node: ir.Node, shared: _Shared) -> None:
    inputs = {name: value for name, value in zip(INPUTS, node.inputs, strict=True) if value is not None}
    tape, query = Tape(), _Query.of(inputs["query"])
    # The output [KV heads, group, S, head_dim] becomes [S, heads * head_dim] by a Transpose and a Reshape.
    turn = _only_consumer(node.outputs[0])
    flat = _only_consumer(turn.outputs[0]) if turn is not None else None
    assert turn is not None and flat is not None and (turn.op_type, flat.op_type) == ("Transpose", "Reshape")
    output = flat.outputs[0]
    one, short = shared.conditions(tape, inputs["mask"])
    row, whole, blocks = (_Branch(f"{node.name}{name}", shared) for name in (_ROW, "_whole", "_blocks"))
    several = _Branch(f"{node.name}_several", shared)
    attended = several.op(
        "If",
        short,
        then_branch=whole.graph(whole.attend(query, inputs), output),
        else_branch=blocks.graph(_attend_in_blocks(blocks, query, inputs), output),
    )
    branches = {
        "then_branch": row.graph(row.attend_one(query, inputs, shared.lengths(tape, inputs)), output),
        "else_branch": several.graph(attended, output),
    }
    replace_nodes(graph, flat, [flat, turn, node], tape, {output: tape.op("If", [one], branches)})


@dataclass(frozen=True)
class _Query:
    # Queries before they become [KV heads, group, S, head_dim]: `rows` of S * heads * head_dim numbers, and the factor to come.
    rows: ir.Value
    scale: ir.Value | None
    shape: tuple[int, int, int]  # KV heads, group, head_dim

    @classmethod
    def of(cls, query: ir.Value) -> _Query:
        assert query.shape is not None
        shape = _static(query.shape[0]), _static(query.shape[1]), _static(query.shape[3])
        node, scale = query.producer(), None
        if node is not None and node.op_type == "Mul":
            turned, scale = node.inputs
            node = turned.producer() if turned is not None else None
        assert node is not None and node.op_type == "Transpose" and node.inputs[0] is not None
        view = node.inputs[0].producer()
        assert view is not None and view.op_type == "Reshape" and view.inputs[0] is not None
        return cls(view.inputs[0], scale, shape)

    def turned(self, branch: _Branch) -> ir.Value:
        # [KV heads, group, S, head_dim], scaled.
        heads, group, width = self.shape
        rows = branch.op("Reshape", self.rows, branch.constant(-1, heads, group, width))
        return self.scaled(branch, branch.op("Transpose", rows, perm=[1, 2, 0, 3]))

    def scaled(self, branch: _Branch, rows: ir.Value) -> ir.Value:
        return rows if self.scale is None else branch.op("Mul", rows, self.scale)

    def flattened(self, branch: _Branch, mixed: ir.Value) -> ir.Value:
        return branch.op("Reshape", branch.op("Transpose", mixed, perm=[2, 0, 1, 3]), branch.constant(-1, math.prod(self.shape)))


class _Shared:
    # What the attention of several layers has in common: constants, and what follows from the lengths of their keys.
    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._constants: dict[tuple[int, ...], ir.Value] = {}
        self._conditions: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._lengths: dict[tuple[str, ...], ir.Value] = {}

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

    def conditions(self, tape: Tape, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        # Whether there is one row of queries, and whether there are few.
        if mask not in self._conditions:
            length = tape.op("Shape", [mask], {"start": 0, "end": 1})
            one, few = (tape.op("Less", [length, self.constant(limit)]) for limit in (2, MIN_BLOCKED_LENGTH))
            self._conditions[mask] = one, few
        return self._conditions[mask]

    def lengths(self, tape: Tape, inputs: dict[str, ir.Value]) -> ir.Value:
        # The numbers of keys in the order of KV_PREFIXES, for one row.
        past, _, visual = (inputs[f"{prefix}key"] for prefix in KV_PREFIXES)
        known = tuple(str(key.shape[0]) if key.shape is not None else str(key.name) for key in (past, visual))
        if known not in self._lengths:
            text, image = (tape.op("Shape", [key], {"start": 0, "end": 1}) for key in (past, visual))
            self._lengths[known] = tape.op("Concat", [text, self.constant(1), image], {"axis": 0})
        return self._lengths[known]


class _Branch:
    # Builds the subgraph of one branch. Value names carry its prefix, because names of the outer graph are visible inside.
    def __init__(self, name: str, shared: _Shared) -> None:
        self._name, self._tape, self.constant = name, Tape(), shared.constant

    def op(self, kind: str, *inputs: ir.Value, **attributes: int | Sequence[int] | ir.Graph) -> ir.Value:
        (value,) = self.op_multi(kind, 1, *inputs, **attributes)
        return value

    def op_multi(
        self, kind: str, outputs: int, *inputs: ir.Value, **attributes: int | Sequence[int] | ir.Graph
    ) -> Sequence[ir.Value]:
        number = len(self._tape.nodes)
        values = [ir.Value(name=f"{self._name}_{number}_{output}") for output in range(outputs)]
        self._tape.op_multi_out(kind, inputs, attributes, outputs=values, name=f"{self._name}_{number}")
        return values

    def slice(self, value: ir.Value, start: ir.Value, end: ir.Value, axis: int) -> ir.Value:
        return self.op("Slice", value, start, end, self.constant(axis))

    def graph(self, result: ir.Value, like: ir.Value) -> ir.Graph:
        result.type, result.shape = like.type, like.shape
        return ir.Graph([], [result], nodes=list(self._tape.nodes), name=self._name)

    def attend_one(self, query: _Query, inputs: dict[str, ir.Value], lengths: ir.Value) -> ir.Value:
        # Like `attend`, for one row of queries: every shape is known, and the mask needs no axis for the heads. No key is copied.
        rows = query.scaled(self, self.op("Reshape", query.rows, self.constant(*query.shape)))
        keys, values = ([inputs[f"{prefix}{kind}"] for prefix in KV_PREFIXES] for kind in ("key", "value"))
        scores = self.op("Concat", *(self.op("MatMul", rows, self.op("Transpose", key, perm=[1, 2, 0])) for key in keys), axis=2)
        weights = self.op("Softmax", self.op("Add", scores, inputs["mask"]), axis=-1)
        parts = self.op_multi("Split", 3, weights, lengths, axis=2)
        mixed = [
            self.op("MatMul", part, self.op("Transpose", value, perm=[1, 0, 2])) for part, value in zip(parts, values, strict=True)
        ]
        return self.op("Reshape", self.op("Sum", *mixed), self.constant(1, math.prod(query.shape)))

    def attend(self, query: _Query, inputs: dict[str, ir.Value]) -> ir.Value:
        # Like attention._mixed: separate key segments with concatenated scores. No key is expanded or copied.
        heads, group, width = query.shape
        turned = query.turned(self)
        rows = self.op("Reshape", turned, self.constant(heads, -1, width))
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
        return query.flattened(self, self.op("Reshape", self.op("Sum", *mixed), self.op("Shape", turned)))


def _static(size: object) -> int:
    assert isinstance(size, int)
    return size


def _attend_in_blocks(branch: _Branch, query: _Query, inputs: dict[str, ir.Value]) -> ir.Value:
    rows, mask, reach = query.turned(branch), inputs["mask_in_row"], inputs["reach"]
    # Concatenated keys [KV heads, 1, head_dim, n] and values [KV heads, 1, n, head_dim], broadcast over the heads of a group.
    one = branch.constant(1)
    keys = branch.op("Unsqueeze", branch.op("Transpose", _concat_tokens(branch, inputs, "key"), perm=[1, 2, 0]), one)
    values = branch.op("Unsqueeze", branch.op("Transpose", _concat_tokens(branch, inputs, "value"), perm=[1, 0, 2]), one)
    length = branch.op("Shape", mask, start=0, end=1)
    past = branch.op("Sub", branch.op("Shape", mask, start=1, end=2), length)
    edges = [
        branch.op("Div", branch.op("Mul", length, branch.constant(block)), branch.constant(BLOCKS)) for block in range(BLOCKS + 1)
    ]
    mixed, zero = [], branch.constant(0)
    for start, end in pairwise(edges):
        visible = branch.op("Add", past, branch.op("ReduceMax", branch.slice(reach, start, end, 0), keepdims=1))
        scores = branch.op("MatMul", branch.slice(rows, start, end, 2), branch.slice(keys, zero, visible, 3))
        bias = branch.slice(branch.slice(mask, start, end, 0), zero, visible, 1)
        weights = branch.op("Softmax", branch.op("Add", scores, bias), axis=-1)
        mixed.append(branch.op("MatMul", weights, branch.slice(values, zero, visible, 2)))
    return query.flattened(branch, branch.op("Concat", *mixed, axis=2))


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
