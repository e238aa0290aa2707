"""Rotary positions of an encoder as the operator that opset 23 has for them: two passes over the states instead of six."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape


def fuse_rotation(graph: ir.Graph) -> None:
    """Replace x * cos + concat(-second half, first half) * sin by RotaryEmbedding, for x [heads, patches, head_dim]."""
    halves: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type == "Concat" and (found := _rotation(node)) is not None:
            _fuse(graph, *found, halves)


def _rotation(concat: ir.Node) -> tuple[ir.Node, ir.Value, ir.Value, ir.Value] | None:
    # The last node, x, and the tables of cosines and sines.
    turned, first = concat.inputs[0], concat.inputs[1]
    negated = turned.producer() if turned is not None else None
    if len(concat.inputs) != 2 or first is None or negated is None or negated.op_type != "Neg":
        return None
    x, product = _halved(first, negated.inputs[0]), _only(concat.outputs[0], "Mul")
    added = _only(product.outputs[0], "Add") if product is not None else None
    if x is None or product is None or added is None:
        return None
    other = next((value.producer() for value in added.inputs if value is not None and value is not product.outputs[0]), None)
    if other is None or other.op_type != "Mul" or x not in other.inputs:
        return None
    cos, sin = _beside(other, x), _beside(product, concat.outputs[0])
    return (added, x, cos, sin) if cos is not None and sin is not None else None


def _halved(first: ir.Value, second: ir.Value | None) -> ir.Value | None:
    # Of what [heads, patches, head_dim] they are the halves.
    nodes = [half.producer() if half is not None else None for half in (first, second)]
    if nodes[0] is None or nodes[1] is None or {node.op_type for node in nodes if node is not None} != {"Slice"}:
        return None
    x, starts = nodes[0].inputs[0], [_number(node.inputs[1]) for node in nodes if node is not None]
    if x is None or x is not nodes[1].inputs[0] or x.shape is None or len(x.shape) != 3:
        return None
    return x if starts == [0, int(str(x.shape[2])) // 2] else None


def _number(value: ir.Value | None) -> int | None:
    return None if value is None or value.const_value is None else int(value.const_value.numpy()[0])


def _only(value: ir.Value, kind: str) -> ir.Node | None:
    users = value.consumers()
    return users[0] if len(users) == 1 and users[0].op_type == kind else None


def _beside(node: ir.Node, value: ir.Value) -> ir.Value | None:
    return next((other for other in node.inputs if other is not value), None)


def _fuse(graph: ir.Graph, added: ir.Node, x: ir.Value, cos: ir.Value, sin: ir.Value, halves: dict[ir.Value, ir.Value]) -> None:
    assert x.shape is not None
    patches, width = (int(str(size)) for size in list(x.shape)[1:])
    tape, output = Tape(), added.outputs[0]

    def constant(name: str, *numbers: int) -> ir.Value:
        return tape.initializer(ir.tensor(np.array(numbers, np.int64), name=f"{added.name}.{name}"))

    for which, table in (("cos", cos), ("sin", sin)):
        if table not in halves:  # the operator takes the angles of one half: those of the other are the same
            rows = tape.op("Reshape", [table, constant(f"{which}_shape", 1, patches, width)])
            ends = [constant(f"{which}_{word}", number) for word, number in (("start", 0), ("end", width // 2), ("axis", 2))]
            halves[table] = tape.op("Slice", [rows, *ends])
    batch = constant("batch", 0)
    turned = tape.op("RotaryEmbedding", [tape.op("Unsqueeze", [x, batch]), halves[cos], halves[sin]])
    # Tables with a batch in front give their products one.
    value = tape.op("Squeeze", [turned, batch]) if output.shape is not None and len(output.shape) == 3 else turned
    value.type, value.shape = output.type, output.shape
    for initializer in tape.initializers:
        graph.register_initializer(initializer)
    ir.convenience.replace_nodes_and_values(graph, added, [added], list(tape.nodes), [output], [value])
