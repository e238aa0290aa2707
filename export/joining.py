"""Join the query, key and value projections of a layer to one product: a CPU starts its threads once instead of three times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from edgeprune.checkpoint.weights import Matrix
from edgeprune.export.matrices import WholeTensor, matrix_of

_PARTS = ("q_proj", "k_proj", "v_proj")


def join_projections(graph: ir.Graph) -> None:
    """Replace three Gemm nodes by one and a Split wherever they are a layer's projections of one state."""
    groups: dict[tuple[ir.Value, str], dict[str, ir.Node]] = {}
    for node in graph:
        if node.op_type == "Gemm" and (name := str(node.inputs[1].name if node.inputs[1] else "")).endswith(".weight"):
            layer, _, part = name.removesuffix(".weight").rpartition(".")
            assert node.inputs[0] is not None
            groups.setdefault((node.inputs[0], layer), {})[part] = node
    for (state, layer), nodes in groups.items():
        if set(_PARTS) <= set(nodes):
            _join(graph, state, layer, [nodes[part] for part in _PARTS])


@dataclass(frozen=True)
class _Stacked:
    # Matrices of as many columns, one below the other.
    parts: tuple[Matrix, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        pieces, first = [], 0
        for part in self.parts:
            count = part.shape[0]
            begin, end = max(start - first, 0), min(stop - first, count)
            if begin < end:
                pieces.append(part.rows(begin, end))
            first += count
        return torch.cat(pieces)


def _join(graph: ir.Graph, state: ir.Value, layer: str, nodes: Sequence[ir.Node]) -> None:
    weights, biases = zip(*((node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None) for node in nodes), strict=True)
    matrices = tuple(matrix_of(weight) for weight in weights)
    sizes = [matrix.shape[0] for matrix in matrices]
    tape = Tape()
    inputs = [state, tape.initializer(WholeTensor(_Stacked(matrices), f"{layer}.qkv_proj.weight"))]
    if any(biases):
        rows = [np.zeros(size, np.float32) if bias is None else _numbers(bias) for bias, size in zip(biases, sizes, strict=True)]
        inputs.append(tape.initializer(ir.tensor(np.concatenate(rows), name=f"{layer}.qkv_proj.bias")))
    split = tape.initializer(ir.tensor(np.array(sizes, np.int64), name=f"{layer}.qkv_proj.sizes"))
    joined = tape.op("Gemm", inputs, {"transB": 1})
    joined.type = nodes[0].outputs[0].type
    parts = tape.op_multi_out("Split", [joined, split], {"axis": 1}, num_outputs=len(nodes))
    old = [node.outputs[0] for node in nodes]
    for part, value in zip(parts, old, strict=True):
        part.type, part.shape = value.type, value.shape
    for initializer in tape.initializers:
        graph.register_initializer(initializer)
    first = min(nodes, key=list(graph).index)
    ir.convenience.replace_nodes_and_values(graph, first, list(nodes), list(tape.nodes), old, list(parts))


def _numbers(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    numbers: np.ndarray = value.const_value.numpy()
    return numbers
