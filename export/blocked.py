"""Expand the BlockedAttention nodes of a traced decoder: an If whose branches attend in one piece, or row block by row block.

Measured with ONNX Runtime 1.31 on one AVX512 core, 769 tokens, 14 heads on 2 of 64 (ms a layer): parts joined at the scores 49,
keys joined 39, Attention-23 29, GroupQueryAttention 28, eight blocks 31, eight blocks that end with the last visible key 17.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeprune.model.blocked import DOMAIN, INPUTS, OPERATOR

BLOCKS = 8
PLACES = ("past_text_", "", "past_visual_")  # of keys and values, as their names begin
SHORT = 64  # steps of fewer tokens attend in one piece: their scores are small, and the caches are read where they are


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
        value.type, value.shape = output.type, output.shape
        ir.convenience.replace_nodes_and_values(graph, node, [node], list(tape.nodes), [output], [value])


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
