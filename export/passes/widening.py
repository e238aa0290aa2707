"""A bfloat16 graph in float32, with the same roundings and on the same weights, for ONNX Runtime.

ONNX Runtime's CPU casts and moves bfloat16, and has no products of it (1.31.1: Gemm, MatMul, Add and Mul are not implemented).
Every bfloat16 is a float32, so the graph is computed there in float32: stored weights are cast where they are read, and what a
bfloat16 node computes is rounded. Inputs and outputs that were bfloat16 are float32. For float16 ONNX Runtime does this by itself,
without the roundings inside.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.traversal import RecursiveGraphIterator

from edgeprune.lint.operator_support import MOVERS, TYPED_INPUT

# Operators whose output is not of the type that they compute on.
_OTHERS = ("ArgMax", "ArgMin", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Shape", "Size")


def write_widened(path: Path, widened: Path) -> bool:
    """Write the graph at `path` in float32 to `widened` in the same folder; return False, without a file, if it has no bfloat16."""
    model = ir.load(path)
    if not _widen(model.graph):
        return False
    ir.save(model, widened)
    return True


def _widen(graph: ir.Graph) -> bool:
    # `narrow`: what was bfloat16 and becomes float32. Nodes come after what they read, so one pass finds all.
    narrow = {value for value in graph.inputs if value.dtype == ir.DataType.BFLOAT16}
    nodes = list(RecursiveGraphIterator(graph))
    for value in list(graph.initializers.values()):
        if value.dtype == ir.DataType.BFLOAT16:
            cast = _followed(value, [ir.DataType.FLOAT])
            graph.insert_before(graph[0], cast)
            narrow.add(cast[-1].outputs[0])
    for node in nodes:
        for value in _narrow_outputs(node, narrow):
            if node.op_type in MOVERS:
                narrow.add(value)
                continue
            is_cast = node.op_type == "Cast"
            added = _followed(value, [ir.DataType.FLOAT] if is_cast else [ir.DataType.BFLOAT16, ir.DataType.FLOAT])
            assert node.graph is not None
            node.graph.insert_after(node, added)
            narrow |= {added[-1].outputs[0]} if is_cast else {value, added[-1].outputs[0]}
    for value in narrow:
        value.dtype = ir.DataType.FLOAT
    return bool(narrow)


def _narrow_outputs(node: ir.Node, narrow: set[ir.Value]) -> list[ir.Value]:
    if node.op_type == "Cast":
        return list(node.outputs) if node.attributes["to"].as_int() == ir.DataType.BFLOAT16 else []
    index = TYPED_INPUT.get(node.op_type, 0)
    typed = node.inputs[index] if index is not None and index < len(node.inputs) else None
    if typed not in narrow or node.op_type in _OTHERS:
        return []
    return list(node.outputs[:1] if node.op_type == "TopK" else node.outputs)


def _followed(value: ir.Value, kinds: list[ir.DataType]) -> list[ir.Node]:
    # Casts after each other, which all readers of the value then read. The last one takes over the name of an output.
    uses, graph, name = tuple(value.uses()), value.graph, str(value.name)
    nodes, last = list[ir.Node](), value
    for kind in kinds:
        node = ir.node("Cast", [last], {"to": kind})
        nodes.append(node)
        last = node.outputs[0]
        last.name, last.shape, last.dtype = f"{name}.{kind.name.lower()}", value.shape, kind
    for user, index in uses:
        user.replace_input_with(index, last)
    if graph is not None and value.is_graph_output():
        graph.outputs[graph.outputs.index(value)] = last
        value.name, last.name = f"{name}.exact", name
    return nodes
