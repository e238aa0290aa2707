"""Attention of decoders for CPUs: expand BlockedAttention nodes.

A BlockedAttention node becomes an If with two branches: attention in one piece, or in blocks of query rows. Measured with ONNX
Runtime 1.31 on one AVX512 core, 769 tokens, GQA with 14 query and 2 KV heads of size 64 (ms per layer): concatenated scores 49,
concatenated keys 39, Attention-23 29, GroupQueryAttention 28, eight blocks 31, eight blocks up to the last visible key 17.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeprune.bundle.graph_io import LENGTHS, buffer_name, grown_name, scale_name
from edgeprune.export.passes.fusion import MICROSOFT, before_reshapes
from edgeprune.export.passes.projection import Projection
from edgeprune.export.passes.replacement import only_consumer, replace_nodes
from edgeprune.model.attention import DOMAIN, INPUTS, OPERATOR

BLOCKS = 8
KV_PREFIXES = ("past_text_", "", "past_visual_")  # name prefixes of keys and values
MIN_BLOCKED_LENGTH = 64  # shorter steps attend in one piece: their scores are small, and caches are read without a copy
_ROW = "_one_row"  # the end of the name of a branch


def expand_blocked(graph: ir.Graph, *, buffers: bool = False, kv: str = "same") -> None:
    """Replace every BlockedAttention node by operators of ONNX, with what brings its queries and output into shape.

    `buffers`: steps of one token read and extend one buffer of keys and one of values, by ONNX Runtime's GroupQueryAttention. The
    graph gets them as inputs and outputs (`edgeprune.bundle.graph_io`). Rows are then steps of as many conversations, and all of
    them get logits. `kv`: the buffers' type, as in a Lowering; "int8" has scales too.
    """
    nodes = [node for node in graph if (node.domain, node.op_type) == (DOMAIN, OPERATOR)]
    shared = _Shared(graph)
    packed = _Buffers(graph, nodes, shared, kv) if buffers and nodes else None
    for node in nodes:
        _expand(graph, node, shared, packed)


def one_row_branch(node: ir.Node) -> ir.Graph | None:
    """Return the branch of an expanded attention that one row of queries takes, None for any other node."""
    graph = node.attributes["then_branch"].as_graph() if node.op_type == "If" else None
    return graph if graph is not None and str(graph.name).endswith(_ROW) else None


def _expand(graph: ir.Graph, node: ir.Node, shared: _Shared, packed: _Buffers | None) -> None:
    tape, attention = Tape(), _Attention.of(node)
    query, inputs = attention.query, attention.inputs
    # The output [KV heads, group, S, head_dim] becomes [S, heads * head_dim] by a Transpose and a Reshape.
    turn = only_consumer(node.outputs[0])
    flat = only_consumer(turn.outputs[0]) if turn is not None else None
    assert turn is not None and flat is not None and (turn.op_type, flat.op_type) == ("Transpose", "Reshape")
    one, short = shared.conditions(tape, inputs["mask"])
    row, several, whole, blocks = (_Branch(f"{node.name}{name}", shared) for name in (_ROW, "_several", "_whole", "_blocks"))
    projection = None if packed is None else packed.projection(attention)
    several.take(() if projection is None else projection.nodes)
    output = flat.outputs[0]
    attended = several.op(
        "If",
        short,
        then_branch=whole.graph(whole.attend(query, inputs), like=[output]),
        else_branch=blocks.graph(_attend_in_blocks(blocks, query, inputs, shared.blocks(tape, inputs)), like=[output]),
    )
    attended.type, attended.shape = output.type, output.shape
    if packed is not None:
        rows = packed.expand(tape, attention, projection, (row, several), attended)
    else:
        single = row.graph(row.attend_one(query, inputs, shared.lengths(tape, inputs)), like=[output])
        rows = tape.op("If", [one], {"then_branch": single, "else_branch": several.graph(attended, like=[output])})
    # What turned the queries may read values that are in a branch by now.
    turns = () if projection is None else query.turns
    replace_nodes(graph, flat, [flat, turn, node, *turns], tape, {output: rows})


class _Buffers:
    # The keys and values of every layer in one buffer each, which steps of one token read and extend in place.
    def __init__(self, graph: ir.Graph, nodes: Sequence[ir.Node], shared: _Shared, kv: str) -> None:
        self._graph, self._quantized = graph, kv == "int8"
        self._layers = {node: _layer(node) for node in nodes}
        self._caches = {node: self._inputs(node) for node in nodes}
        self._scales = {node: self._scale_inputs(node) if self._quantized else [] for node in nodes}
        lengths = self._input(LENGTHS, ir.DataType.INT32, ["lengths"])
        first, tape = next(iter(self._caches.values()))[0], Tape()
        one = tape.initializer(ir.tensor(np.ones(1, np.int32), name="buffers_one"))
        self._capacity = tape.op("Shape", [first], {"start": 2, "end": 3})
        self._shared, self._tables = shared, dict[tuple[ir.Value, ir.Value], list[ir.Value]]()
        self._bound = tape.op("Less", [shared.constant(1), self._capacity])
        # GroupQueryAttention takes the number of keys before this step, and the largest with it.
        self._most = tape.op("Add", [tape.op("ReduceMax", [lengths]), one])
        layers = {"axis": 0, "num_outputs": len(nodes)}
        split = [lengths] if len(nodes) == 1 else tape.op_multi_out("Split", [lengths], layers, num_outputs=len(nodes))
        self._lengths = dict(zip(nodes, split, strict=True))
        first_row = tape.op("Where", [self._bound, shared.constant(0), shared.constant(-1)])
        _last_row(graph).replace_input_with(1, first_row)
        graph.opset_imports[MICROSOFT] = 1
        for initializer in tape.initializers:
            graph.register_initializer(initializer)
        graph.insert_before(graph[0], tape.nodes)

    def _input(self, name: str, kind: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))
        self._graph.inputs.append(value)
        return value

    def _inputs(self, node: ir.Node) -> list[ir.Value]:
        key = node.inputs[INPUTS.index("key")]
        assert key is not None and key.shape is not None and key.dtype is not None
        shape: list[int | str] = ["conversations", _static(key.shape[1]), "capacity", _static(key.shape[2])]
        kind = ir.DataType.INT8 if self._quantized else key.dtype
        return [self._input(buffer_name(self._layers[node], part), kind, shape) for part in ("key", "value")]

    def _scale_inputs(self, node: ir.Node) -> list[ir.Value]:
        key = node.inputs[INPUTS.index("key")]
        assert key is not None and key.shape is not None
        channels = [_static(key.shape[1]) * _static(key.shape[2])]
        return [self._input(scale_name(self._layers[node], part), ir.DataType.FLOAT, channels) for part in ("key", "value")]

    def projection(self, attention: _Attention) -> Projection | None:
        """Return what the operator can rotate itself; None in 8 bits, where only the graph has the row that it adds as it is."""
        if self._quantized:
            return None
        query, inputs = attention.query, attention.inputs
        return Projection.of(self._graph, query.rows, inputs["key"], inputs["value"], [*query.turns, attention.node])

    def expand(
        self,
        tape: Tape,
        attention: _Attention,
        projection: Projection | None,
        branches: tuple[_Branch, _Branch],
        attended: ir.Value,
    ) -> ir.Value:
        """Return the rows of an attention [S, heads * head_dim], in sequences of one token until a last Reshape.

        `branches`: for steps of one token, and for several rows, whose attention is `attended`.
        """
        (row, several), node = branches, attention.node
        width, caches = math.prod(attention.query.shape), self._caches[node]
        added = () if projection is None else projection.added
        sequences = ir.Value(type=attended.type, shape=_in_sequences(attended))
        grown = [self._add_output(node, part, cache) for part, cache in zip(("key", "value"), caches, strict=True)]
        results = [sequences, *grown, *map(self._take_output, added)]
        others = [*(several.op("Identity", cache) for cache in caches), *added]
        in_sequences = several.op("Reshape", attended, several.constant(-1, 1, width))
        step = row.graph(*self._attend(row, tape, attention, projection), *self._no_rows(row, added), like=results)
        both = {"then_branch": step, "else_branch": several.graph(in_sequences, *others, like=results)}
        tape.op_multi_out("If", [self._bound], both, outputs=results)
        return tape.op("Reshape", [sequences, self._shared.constant(-1, width)])

    def _add_output(self, node: ir.Node, part: str, cache: ir.Value) -> ir.Value:
        value = ir.Value(name=grown_name(self._layers[node], part), type=cache.type, shape=cache.shape)
        self._graph.outputs.append(value)
        return value

    def _take_output(self, value: ir.Value) -> ir.Value:
        # The output of the graph in the place of a value, which is one of a branch from now on.
        output = ir.Value(name=value.name, type=value.type, shape=value.shape)
        self._graph.outputs[self._graph.outputs.index(value)] = output
        value.name = f"{value.name}_several"
        return output

    def _attend(self, row: _Branch, tape: Tape, attention: _Attention, projection: Projection | None) -> Sequence[ir.Value]:
        # The attention of one row of each conversation [conversations, 1, heads * head_dim], and the buffers after it.
        node, query, inputs = attention.node, attention.query, attention.inputs
        heads, group, _ = query.shape
        scale = 1.0 if query.scale is None else float(_constant(query.scale))
        settings: dict[str, Any] = {"num_heads": heads * group, "kv_num_heads": heads, "scale": scale}
        operands: list[ir.Value | None]
        if projection is None:
            operands = [_in_rows(row, value) for value in (query.rows, inputs["key"], inputs["value"])]
        else:
            operands = [None if value is None else _in_rows(row, value) for value in projection.operands]
        operands += [*self._caches[node], self._lengths[node], self._most]
        if projection is not None:
            operands += self._rotation(tape, *projection.angles)
            settings["do_rotary"] = 1
        if self._quantized:
            operands += [*[None] * 5, *self._scales[node]]  # no rotation, positions, bias or sink
            settings |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        return row.op_multi("GroupQueryAttention", 3, *operands, domain=MICROSOFT, **settings)

    def _rotation(self, tape: Tape, cos: ir.Value, sin: ir.Value) -> list[ir.Value]:
        # Tables of cosines and sines and each row's place in them [conversations, 1]. The operator expects as many rows as its
        # buffers have; only the first, of this step's tokens, are read. Pruned tokens keep their positions this way.
        if (cos, sin) not in self._tables:
            assert cos.shape is not None
            half = _static(cos.shape[2])
            beyond = tape.op("ConstantOfShape", [tape.op("Concat", [self._capacity, self._shared.constant(half)], {"axis": 0})])
            rows = [tape.op("Reshape", [angles, self._shared.constant(-1, half)]) for angles in (cos, sin)]
            start, one = (self._number(tape, number) for number in (0, 1))
            count = tape.op("Squeeze", [tape.op("Shape", [cos], {"start": 0, "end": 1})])
            places = tape.op("Unsqueeze", [tape.op("Range", [start, count, one]), self._shared.constant(1)])
            self._tables[cos, sin] = [*(tape.op("Concat", [part, beyond], {"axis": 0}) for part in rows), places]
        return self._tables[cos, sin]

    def _number(self, tape: Tape, number: int) -> ir.Value:
        name = f"buffers_number_{number}"
        return self._graph.initializers.get(name) or tape.initializer(ir.tensor(np.array(number, np.int64), name=name))

    def _no_rows(self, row: _Branch, added: Sequence[ir.Value]) -> list[ir.Value]:
        # In place of the rows that several tokens add to the caches.
        return [row.op("Identity", self._empty(value)) for value in added]

    def _empty(self, like: ir.Value) -> ir.Value:
        assert like.shape is not None
        sizes = [0, *(_static(size) for size in list(like.shape)[1:])]
        name = "buffers_none_" + "_".join(map(str, sizes))
        if name not in self._graph.initializers:
            none = ir.Value(name=name, const_value=ir.tensor(np.zeros(sizes, np.float32), name=name), type=like.type)
            none.shape = ir.Shape(sizes)
            self._graph.register_initializer(none)
        return self._graph.initializers[name]


def _last_row(graph: ir.Graph) -> ir.Node:
    # The Slice of the last token's row, of which the first output has the logits.
    waiting = deque([graph.outputs[0]])
    while True:
        node = waiting.popleft().producer()
        if node is None:
            continue
        start = node.inputs[1] if node.op_type == "Slice" else None
        if start is not None and start.const_value is not None and start.const_value.numpy().tolist() == [-1]:
            return node
        waiting += [value for value in node.inputs if value is not None]


def _layer(node: ir.Node) -> int:
    # The layer of an attention, by the name of its cache.
    value = node.inputs[INPUTS.index("past_text_key")]
    assert value is not None and value.is_graph_input()
    return int(str(value.name).split(".")[1])


def _in_rows(branch: _Branch, value: ir.Value) -> ir.Value:
    # Rows of heads as [S, 1, heads * head_dim], which they may have been before they got another shape.
    for found in (value, before_reshapes(value)):
        if found.shape is not None and len(found.shape) == 3 and found.shape[1] == 1:
            return found
    assert value.shape is not None
    width = math.prod(size for size in value.shape if isinstance(size, int))
    rows = branch.op("Reshape", value, branch.constant(-1, 1, width))
    rows.type, rows.shape = value.type, ir.Shape([value.shape[0], 1, width])
    return rows


def _in_sequences(rows: ir.Value) -> ir.Shape:
    # The shape of rows [S, width] as [S, 1, width].
    assert rows.shape is not None
    return ir.Shape([rows.shape[0], 1, *list(rows.shape)[1:]])


def _constant(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    number: np.ndarray = value.const_value.numpy()
    return number


@dataclass(frozen=True)
class _Query:
    # Queries before they become [KV heads, group, S, head_dim]: `rows` of S * heads * head_dim numbers, and the factor to come.
    rows: ir.Value
    scale: ir.Value | None
    shape: tuple[int, int, int]  # KV heads, group, head_dim
    turns: tuple[ir.Node, ...]  # the nodes that do so, the last one first

    @classmethod
    def of(cls, query: ir.Value) -> _Query:
        assert query.shape is not None
        shape = _static(query.shape[0]), _static(query.shape[1]), _static(query.shape[3])
        node, scale, turns = query.producer(), None, list[ir.Node]()
        if node is not None and node.op_type == "Mul":
            turned, scale = node.inputs
            turns.append(node)
            node = turned.producer() if turned is not None else None
        assert node is not None and node.op_type == "Transpose" and node.inputs[0] is not None
        view = node.inputs[0].producer()
        assert view is not None and view.op_type == "Reshape" and view.inputs[0] is not None
        return cls(view.inputs[0], scale, shape, (*turns, node, view))

    def turned(self, branch: _Branch) -> ir.Value:
        # [KV heads, group, S, head_dim], scaled.
        heads, group, width = self.shape
        rows = branch.op("Reshape", self.rows, branch.constant(-1, heads, group, width))
        return self.scaled(branch, branch.op("Transpose", rows, perm=[1, 2, 0, 3]))

    def scaled(self, branch: _Branch, rows: ir.Value) -> ir.Value:
        return rows if self.scale is None else branch.op("Mul", rows, self.scale)

    def flattened(self, branch: _Branch, mixed: ir.Value) -> ir.Value:
        return branch.op("Reshape", branch.op("Transpose", mixed, perm=[2, 0, 1, 3]), branch.constant(-1, math.prod(self.shape)))


@dataclass(frozen=True)
class _Block:
    # The rows of queries from `start` to `end`, how many keys any of them sees, and what is added to their scores.
    start: ir.Value
    end: ir.Value
    visible: ir.Value
    bias: ir.Value


@dataclass(frozen=True)
class _Attention:
    # A node of BlockedAttention, what it reads by the names of INPUTS, and its queries.
    node: ir.Node
    inputs: dict[str, ir.Value]
    query: _Query

    @classmethod
    def of(cls, node: ir.Node) -> _Attention:
        inputs = {name: value for name, value in zip(INPUTS, node.inputs, strict=True) if value is not None}
        return cls(node, inputs, _Query.of(inputs["query"]))


class _Shared:
    # What the attention of several layers has in common: constants, and what follows from the lengths of their keys.
    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._constants: dict[tuple[int, ...], ir.Value] = {}
        self._conditions: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._lengths: dict[tuple[str, ...], ir.Value] = {}
        self._blocks: dict[ir.Value, list[_Block]] = {}

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

    def blocks(self, tape: Tape, inputs: dict[str, ir.Value]) -> list[_Block]:
        # The blocks of a mask, cut once for all layers. A short step cuts none.
        mask = inputs["mask_in_row"]
        if mask not in self._blocks:
            _, short = self.conditions(tape, inputs["mask"])
            length = tape.op("Shape", [mask], {"start": 0, "end": 1})
            none, cut = (_Branch(f"blocks_{len(self._blocks)}_{name}", self) for name in ("none", "cut"))
            values = _cut_blocks(cut, mask, inputs["reach"], length)
            zeros: list[np.ndarray] = [np.zeros(len(values) - BLOCKS, np.int64), np.zeros((BLOCKS, 1), np.float32)]
            kinds = [ir.TensorType(ir.DataType.INT64)] * len(zeros[0]) + [mask.type] * BLOCKS
            nothing = list[ir.Value]()
            for zero in zeros:
                whole = tape.initializer(ir.tensor(zero, name=f"{mask.name}.none_{zero.ndim}"))
                nothing += none.op_multi("Split", len(zero), whole, axis=0, num_outputs=len(zero))
            for value, kind in zip((*values, *nothing), kinds * 2, strict=True):
                value.type = kind
            branches = {"then_branch": none.graph(*nothing), "else_branch": cut.graph(*values)}
            outer = tape.op_multi_out("If", [short], branches, num_outputs=len(values))
            edges = pairwise([self.constant(0), *outer[: BLOCKS - 1], length])
            seen = zip(outer[BLOCKS - 1 : -BLOCKS], outer[-BLOCKS:], strict=True)
            self._blocks[mask] = [_Block(*edge, *rest) for edge, rest in zip(edges, seen, strict=True)]
        return self._blocks[mask]


class _Branch:
    # Builds the subgraph of one branch. Value names carry its prefix, because names of the outer graph are visible inside.
    def __init__(self, name: str, shared: _Shared) -> None:
        self._name, self._tape, self.constant = name, Tape(), shared.constant
        self._taken: tuple[ir.Node, ...] = ()

    def take(self, nodes: Sequence[ir.Node]) -> None:
        """Begin with nodes of the outer graph, which are removed there."""
        for node in nodes:
            assert node.graph is not None
            node.graph.remove(node)
        self._taken = tuple(nodes)

    def op(self, kind: str, *inputs: ir.Value, **attributes: float | Sequence[int] | ir.Graph) -> ir.Value:
        (value,) = self._write(kind, 1, inputs, "", attributes)
        return value

    def op_multi(
        self, kind: str, outputs: int, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        return self._write(kind, outputs, inputs, domain, attributes)

    def _write(
        self, kind: str, outputs: int, inputs: Sequence[ir.Value | None], domain: str, attributes: dict[str, Any]
    ) -> Sequence[ir.Value]:
        number = len(self._tape.nodes)
        values = [ir.Value(name=f"{self._name}_{number}_{output}") for output in range(outputs)]
        self._tape.op_multi_out(kind, inputs, attributes, outputs=values, name=f"{self._name}_{number}", domain=domain)
        return values

    def slice(self, value: ir.Value, start: ir.Value, end: ir.Value, axis: int) -> ir.Value:
        return self.op("Slice", value, start, end, self.constant(axis))

    def graph(self, *results: ir.Value, like: Sequence[ir.Value] = ()) -> ir.Graph:
        for result, value in zip(results, like or results, strict=True):
            result.type, result.shape = value.type, value.shape
        return ir.Graph([], list(results), nodes=[*self._taken, *self._tape.nodes], name=self._name)

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


def _attend_in_blocks(branch: _Branch, query: _Query, inputs: dict[str, ir.Value], blocks: Sequence[_Block]) -> ir.Value:
    rows, one, zero = query.turned(branch), branch.constant(1), branch.constant(0)
    # Concatenated keys [KV heads, 1, head_dim, n] and values [KV heads, 1, n, head_dim], broadcast over the heads of a group.
    keys = branch.op("Unsqueeze", branch.op("Transpose", _concat_tokens(branch, inputs, "key"), perm=[1, 2, 0]), one)
    values = branch.op("Unsqueeze", branch.op("Transpose", _concat_tokens(branch, inputs, "value"), perm=[1, 0, 2]), one)
    mixed = []
    for block in blocks:
        scores = branch.op("MatMul", branch.slice(rows, block.start, block.end, 2), branch.slice(keys, zero, block.visible, 3))
        weights = branch.op("Softmax", branch.op("Add", scores, block.bias), axis=-1)
        mixed.append(branch.op("MatMul", weights, branch.slice(values, zero, block.visible, 2)))
    return query.flattened(branch, branch.op("Concat", *mixed, axis=2))


def _cut_blocks(branch: _Branch, mask: ir.Value, reach: ir.Value, length: ir.Value) -> list[ir.Value]:
    # The inner edges of the blocks, the keys that each sees, and its part of the mask.
    past, zero = branch.op("Sub", branch.op("Shape", mask, start=1, end=2), length), branch.constant(0)
    inner = [
        branch.op("Div", branch.op("Mul", length, branch.constant(block)), branch.constant(BLOCKS)) for block in range(1, BLOCKS)
    ]
    visible, bias = list[ir.Value](), list[ir.Value]()
    for start, end in pairwise([zero, *inner, length]):
        visible.append(branch.op("Add", past, branch.op("ReduceMax", branch.slice(reach, start, end, 0), keepdims=1)))
        bias.append(branch.slice(branch.slice(mask, start, end, 0), zero, visible[-1], 1))
    return [*inner, *visible, *bias]


def _concat_tokens(branch: _Branch, inputs: dict[str, ir.Value], kind: str) -> ir.Value:
    # Cached visual tokens and cached text without their null rows, then this step's tokens [n, KV heads, head_dim].
    cached = [
        branch.slice(inputs[f"{prefix}{kind}"], branch.constant(1), branch.constant(1 << 40), 0)
        for prefix in ("past_visual_", "past_text_")
    ]
    return branch.op("Concat", *cached, inputs[kind], axis=0)
