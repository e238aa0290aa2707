"""Divide what smoothed matrices multiply by their factors (edgeprune/model/smoothquant.py).

Where a norm writes the input, its weight and bias are divided, and the graph has no node more. Where none does, or something else
reads the norm too, it takes a product of its own, elementwise as what is before it and the QuantizeLinear behind it. To divide the
rows of an up projection instead, for the down projection behind it, would take no node either. But factors of massive activations
reach hundreds, and float16 does not hold the scales of such rows (its smallest normal number is 6e-5), nor always what small
factors make of the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from edgeprune.export.passes.weights import LazyInitializer, SmoothedMatrix, matrix_of
from edgeprune.model.smoothquant import Rounding
from edgeprune.targets import Lowering

_NORMS = ("LayerNormalization", "RMSNormalization")
_WEIGHT = 1  # index of a Gemm's matrix, and of a norm's weight; a bias is the next


def smooth_products(graph: ir.Graph, lowering: Lowering, part: str) -> None:
    """Make the matrices of a graph that a lowering rounds the inputs of smoothed ones, and divide these inputs by their factors.

    `part`: as for `lower_products`.
    """
    readers: dict[ir.Value, list[tuple[ir.Node, torch.Tensor]]] = {}
    for node in graph:
        rounding = _smoothed(node, lowering, part) if node.op_type == "Gemm" else None
        if rounding is not None and rounding.smooths:
            assert node.inputs[0] is not None
            readers.setdefault(node.inputs[0], []).append((node, rounding.factors))
    for state, found in readers.items():
        nodes, factors = [node for node, _ in found], [each for _, each in found]
        alike = all(torch.equal(each, factors[0]) for each in factors)
        alone = {user for user, _ in state.uses()} == set(nodes) and not state.is_graph_output()
        if not (alike and alone and _divide_at_source(graph, state, factors[0])):
            _divide_apart(graph, state, nodes, factors)


def _smoothed(node: ir.Node, lowering: Lowering, part: str) -> Rounding | None:
    weight = node.inputs[_WEIGHT]
    assert weight is not None
    rounding: Rounding | None = lowering.rounding_of(part, str(weight.name))
    if rounding is not None and not isinstance(matrix := matrix_of(weight), SmoothedMatrix):  # a weight may be used twice
        weight.const_value = LazyInitializer(SmoothedMatrix(matrix, rounding), str(weight.name))
    return rounding


def _divide_at_source(graph: ir.Graph, state: ir.Value, factors: torch.Tensor) -> bool:
    node = state.producer()
    if node is None:
        return False
    if node.op_type in _NORMS:
        for index, value in enumerate(node.inputs[_WEIGHT:], start=_WEIGHT):
            if value is not None:
                node.replace_input_with(index, _divided(graph, value, factors, state))
        return True
    if node.op_type != "Mul":
        return False
    for index, value in enumerate(node.inputs):
        if value is not None and value.const_value is not None and value.const_value.size == len(factors):  # the weight of a norm
            node.replace_input_with(index, _divided(graph, value, factors, state))
            return True
    return False


def _divide_apart(graph: ir.Graph, state: ir.Value, nodes: Sequence[ir.Node], factors: Sequence[torch.Tensor]) -> None:
    quotient: ir.Value | None = None
    for number, (node, each) in enumerate(zip(nodes, factors, strict=True)):
        if quotient is None or not torch.equal(each, factors[number - 1]):
            name = f"{state.name}.of.{node.inputs[_WEIGHT].name}"  # type: ignore[union-attr]
            added = ir.node("Mul", [state, _register(graph, 1 / each.numpy(), f"{name}.reciprocals")])
            quotient = added.outputs[0]
            quotient.name, quotient.shape, quotient.type = name, state.shape, state.type
            graph.insert_before(node, added)
        node.replace_input_with(0, quotient)


def _divided(graph: ir.Graph, value: ir.Value, factors: torch.Tensor, state: ir.Value) -> ir.Value:
    # A constant over the factors, for the one node that writes `state`.
    assert value.const_value is not None
    numbers = value.const_value.numpy()
    return _register(graph, numbers / factors.numpy().reshape(numbers.shape), f"{value.name}.of.{state.name}")


def _register(graph: ir.Graph, numbers: np.ndarray, name: str) -> ir.Value:
    tensor = ir.tensor(numbers.astype(np.float32), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(numbers.shape), const_value=tensor)
    graph.register_initializer(value)
    return value
