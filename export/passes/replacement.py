"""Replace nodes of a graph; shapes that are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape


def replace_nodes(graph: ir.Graph, at: ir.Node, nodes: Sequence[ir.Node], tape: Tape, values: Mapping[ir.Value, ir.Value]) -> None:
    """Insert the nodes of a tape at the position of the node `at`, and remove `nodes`.

    `values`: maps outputs of the removed nodes to their replacements, which take over name, type and shape.
    """
    for old, new in values.items():
        new.type, new.shape = old.type, old.shape
    for initializer in tape.initializers:
        graph.register_initializer(initializer)
    ir.convenience.replace_nodes_and_values(graph, at, list(nodes), list(tape.nodes), list(values), list(values.values()))


def only_consumer(value: ir.Value) -> ir.Node | None:
    """Return the node that alone reads a value, None if there are several or the value is an output of the graph."""
    consumers = value.consumers()
    return consumers[0] if len(consumers) == 1 and not value.is_graph_output() else None


def sizes_of(value: ir.Value | None) -> tuple[int, ...]:
    """Return the shape of a value, or nothing where one of its sizes is not known."""
    shape = () if value is None or value.shape is None else tuple(value.shape)
    sizes = tuple(size for size in shape if isinstance(size, int))
    return sizes if len(sizes) == len(shape) else ()


def reshaped(tape: Tape, value: ir.Value, sizes: Sequence[int], name: str) -> ir.Value:
    """Return a value in another shape, or itself if it has that; `name` is that of the Reshape."""
    if sizes_of(value) == tuple(sizes):
        return value
    shaped = tape.op("Reshape", [value, tape.initializer(ir.tensor(np.array(sizes, np.int64), name=f"{name}.shape"))])
    shaped.type, shaped.shape = value.type, ir.Shape(sizes)
    return shaped
