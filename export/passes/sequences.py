"""Rows of a decoder as sequences of one token each, the layout in which GroupQueryAttention takes and returns them.

A step of one token then needs no Reshape before and behind attention. Every operator on the way acts on the last axis alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

# What acts on rows [S, width] as on [S, 1, width]. Of a Gemm this is true once it is lowered (`lower_products`).
_ROWWISE = ("Gemm", "RMSNormalization", "SkipSimplifiedLayerNormalization", "Add", "Mul", "Sigmoid", "Gelu", "Split")


def rows_as_sequences(graph: ir.Graph) -> None:
    """Give the rows [S, width] behind every attention the shape [S, 1, width], up to where an operator takes two axes.

    Attention must be expanded with buffers. All Gemm nodes have to be lowered to products that take any number of axes.
    """
    values, nodes = _rows_of_attention(graph)
    for value in values:
        if value.producer() in nodes:
            _lift(graph, value, nodes)
        else:
            _enter(graph, value, nodes)
    for node in nodes:
        if node.op_type == "Split":
            node.attributes["axis"] = ir.AttrInt64("axis", -1)


def _rows_of_attention(graph: ir.Graph) -> tuple[list[ir.Value], set[ir.Node]]:
    # All values of two axes that nodes of _ROWWISE connect with the output of an attention, in a fixed order, and these nodes.
    waiting = [node.outputs[0] for node in graph if _leaves_sequences(node)]
    values: dict[ir.Value, None] = {}
    nodes = set[ir.Node]()
    while waiting:
        value = waiting.pop()
        if value in values:
            continue
        values[value] = None
        producer = value.producer()
        for node in [*([] if producer is None else [producer]), *value.consumers()]:
            if node.graph is graph and _is_rowwise(node):
                nodes.add(node)
                waiting += [other for other in (*node.inputs, *node.outputs) if other is not None and _is_rows(other)]
    return list(values), nodes


def _lift(graph: ir.Graph, value: ir.Value, nodes: set[ir.Node]) -> None:
    # The producer gives sequences. Whatever needs rows gets them from a Reshape, if it is none itself.
    rows, width = _sizes(value)
    value.shape = ir.Shape([rows, 1, width])
    back: ir.Value | None = None
    for node, index in value.uses():
        if node in nodes:
            continue
        if node.op_type != "Reshape":
            back = back or _reshaped(graph, value, _shape(graph, -1, width), [rows, width])
            node.replace_input_with(index, back)
        elif list(node.outputs[0].shape or ()) == [rows, 1, width] and not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
    assert not value.is_graph_output()


def _enter(graph: ir.Graph, value: ir.Value, nodes: set[ir.Node]) -> None:
    # Only the readers among `nodes` take sequences.
    rows, width = _sizes(value)
    producer, sequences = value.producer(), None
    if producer is not None and _leaves_sequences(producer):
        sequences = producer.inputs[0]
    for node, index in value.uses():
        if node in nodes:
            sequences = sequences or _reshaped(graph, value, _shape(graph, -1, 1, width), [rows, 1, width])
            node.replace_input_with(index, sequences)
    if producer is not None and _leaves_sequences(producer) and not value.uses() and not value.is_graph_output():
        graph.remove(producer, safe=True)


def _sizes(value: ir.Value) -> tuple[int | ir.SymbolicDim, int]:
    assert value.shape is not None and isinstance(value.shape[1], int)
    return value.shape[0], value.shape[1]


def _reshaped(graph: ir.Graph, value: ir.Value, shape: ir.Value, sizes: Sequence[int | ir.SymbolicDim]) -> ir.Value:
    node = ir.node("Reshape", [value, shape])
    node.outputs[0].type, node.outputs[0].shape = value.type, ir.Shape(sizes)
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return node.outputs[0]


def _shape(graph: ir.Graph, *sizes: int) -> ir.Value:
    # What a Reshape reads.
    name = "sequences_" + "_".join(map(str, sizes)).replace("-", "m")
    if name not in graph.initializers:
        value = ir.Value(name=name, const_value=ir.tensor(np.array(sizes, np.int64), name=name))
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(sizes)])
        graph.register_initializer(value)
    return graph.initializers[name]


def _leaves_sequences(node: ir.Node) -> bool:
    # A Reshape from sequences of one token to rows, whose input may be taken instead.
    source, rows = (node.inputs[0], node.outputs[0]) if node.op_type == "Reshape" else (None, node.outputs[0])
    if source is None or source.shape is None or rows.shape is None or not _is_rows(rows):
        return False
    return len(source.shape) == 3 and source.shape[1] == 1 and source.shape[2] == rows.shape[1]


def _is_rows(value: ir.Value) -> bool:
    return value.const_value is None and value.shape is not None and len(value.shape) == 2


def _is_rowwise(node: ir.Node) -> bool:
    shapes = [value.shape for value in node.inputs if value is not None and value.const_value is None]
    if node.op_type not in _ROWWISE or any(shape is None or len(shape) > 2 for shape in shapes):
        return False
    axis = node.attributes.get("axis")
    return node.op_type != "Split" or (axis is not None and axis.as_int() in (1, -1))
