"""Passes over traced graphs: dimension names, fused norms, the precision of matrix products and weights."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnx_ir.tape import Tape
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.fusion._rms_normalization import rms_normalization_rules

from edgeprune.bundle import GraphRecord, Tensor
from edgeprune.checkpoint.weights import StoredTensor, address
from edgeprune.errors import UnsupportedModelError
from edgeprune.export.blocked import expand_blocked
from edgeprune.export.integers import IntegerProducts
from edgeprune.export.joining import join_projections
from edgeprune.export.matrices import IntegerMatrix, WholeTensor, halved, matrix_of
from edgeprune.export.optimization import optimize
from edgeprune.export.rotation import fuse_rotation
from edgeprune.export.tiling import tile_attention
from edgeprune.targets import Lowering

Known = dict[ir.Value, ir.Value]  # what was lowered already, and to what
_TYPES = {"float16": torch.float16, "float32": torch.float32}


def finish(
    model: ir.Model,
    dimensions: Mapping[str, Mapping[int, str]],
    lowering: Lowering,
    part: str,
    stored: Mapping[int, StoredTensor],
) -> ir.Model:
    """Return a traced graph as it is written: `dimensions` names the dynamic axes of inputs, `part` whose
    matrices they are: "layers" (the decoder), "vision", "embedding" or "" for a graph that stays as it is. `stored`: what
    placeholders among its weights stand for, which is read when the graph is saved.
    """
    _leave_stored(model.graph, stored)
    optimize(model)
    expand_blocked(model.graph)
    # The exporter notes the source line of every node, with paths of the machine that exports.
    ClearMetadataAndDocStringPass()(model)
    _name_dimensions(model.graph, dimensions)
    if lowering.target.fused:
        model = rewrite(model, pattern_rewrite_rules=rms_normalization_rules)
    if lowering.target.blocked:
        join_projections(model.graph)
        fuse_rotation(model.graph)
        tile_attention(model.graph)
    if part == "embedding":
        _lower_table(model.graph, lowering)
    elif part in ("layers", "vision"):
        _lower_products(model.graph, lowering, part)
    RemoveUnusedNodesPass()(model)
    return model


def drop_unread(graph: ir.Graph) -> None:
    """Remove the inputs that no node reads: what a graph does not ask for, the runtime need not compute.

    A selector without the prompt chooses the same whatever is asked, so that its choice can be recalled.
    """
    for value in [value for value in graph.inputs if not value.uses() and value not in graph.outputs]:
        graph.inputs.remove(value)


def described(graph: ir.Graph) -> GraphRecord:
    """Return the inputs and outputs of a graph."""
    return GraphRecord(*({str(value.name): _tensor(value) for value in side} for side in (graph.inputs, graph.outputs)))


def _tensor(value: ir.Value) -> Tensor:
    assert value.shape is not None and value.dtype is not None
    return Tensor(str(value.dtype.numpy()), tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape))


def _leave_stored(graph: ir.Graph, stored: Mapping[int, StoredTensor]) -> None:
    for value in graph.initializers.values():
        tensor = value.const_value.raw if value.const_value is not None else None
        if not isinstance(tensor, torch.Tensor):
            continue
        source = stored.get(address(tensor))
        if source is not None:
            assert tensor.shape == source.size and not any(tensor.stride())
            value.const_value = WholeTensor(source, str(value.name))
        elif tensor.is_floating_point() and tensor.isnan().any():
            # A family that computes with a large matrix gets this, as placeholders are no numbers.
            raise UnsupportedModelError(f"Some of the numbers that {value.name} becomes are none: the weights are broken.")


def _name_dimensions(graph: ir.Graph, dimensions: Mapping[str, Mapping[int, str]]) -> None:
    # The exporter calls them s31 where two inputs share one; an engine's profile wants to know which is which.
    renamed: dict[str, str] = {}
    for value in graph.inputs:
        for axis, name in dimensions.get(value.name or "", {}).items():
            assert value.shape is not None
            renamed[str(value.shape[axis].value)] = name  # type: ignore[union-attr]
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, renamed)) + r")\b")
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            [
                pattern.sub(lambda match: renamed[match[0]], str(axis.value))
                if renamed and isinstance(axis, ir.SymbolicDim)
                else axis
                for axis in value.shape
            ]
        )


def _lower_table(graph: ir.Graph, lowering: Lowering) -> None:
    kind = lowering.weights_of("embedding")
    if kind == "fp32":
        return
    (gather,) = (node for node in graph if node.op_type == "Gather")
    tape, (table, ids) = Tape(), gather.inputs
    assert table is not None
    if kind == "fp16":
        rows = tape.op("Gather", [_halved(tape, table, {}), ids])
        _put(graph, gather, tape, tape.op("Cast", [rows], {"to": ir.DataType.FLOAT}))
        return
    integers, scales = _parts(tape, table, IntegerMatrix(matrix_of(table), kind, torch.float32, table=True))
    last = tape.initializer(ir.tensor(np.array([-1], np.int64), name=f"{table.name}.last_axis"))
    rows = tape.op("Cast", [tape.op("Gather", [integers, ids])], {"to": ir.DataType.FLOAT})
    _put(graph, gather, tape, tape.op("Mul", [rows, tape.op("Unsqueeze", [tape.op("Gather", [scales, ids]), last])]))


def _lower_products(graph: ir.Graph, lowering: Lowering, part: str) -> None:
    known: Known = {}
    integers = IntegerProducts()
    half = lowering.products == "float16"
    for node in list(graph):
        # The decoder's own products of activations are of the type of its cache already.
        if node.op_type == "Gemm" and lowering.precision != "fp32":
            tape = Tape()
            product = _linear(tape, node, lowering, part, known, integers)
        elif node.op_type == "MatMul" and part == "vision" and half:
            tape = Tape()
            product = tape.op("MatMul", [_cast(tape, value, known) for value in node.inputs])
        else:
            continue
        _put(graph, node, tape, tape.op("Cast", [product], {"to": ir.DataType.FLOAT}) if half else product)
    _check_lowered(graph, lowering)


def _check_lowered(graph: ir.Graph, lowering: Lowering) -> None:
    # A layer that the exporter writes otherwise would keep its weights in float32, and nobody would notice.
    if lowering.precision == "fp32":
        return
    left = [
        value.name
        for node in graph
        if node.op_type in ("Gemm", "MatMul", "Conv")
        for value in node.inputs
        if value is not None and value.const_value is not None and str(value.name).endswith(".weight")
    ]
    assert not left, f"not lowered to {lowering.precision}: {left}"


def _linear(tape: Tape, node: ir.Node, lowering: Lowering, part: str, known: Known, integers: IntegerProducts) -> ir.Value:
    # The exporter writes a linear layer as Gemm with the weight [out, in].
    state, weight, *bias = node.inputs
    assert weight is not None and weight.const_value is not None
    half = lowering.products == "float16"
    kind = lowering.weights_of("head" if "lm_head" in str(weight.name) else part)
    state = _cast(tape, state, known) if half else state
    added = [_halved(tape, value, known) if half else value for value in bias]
    if kind == "fp16":
        return tape.op("Gemm", [state, _halved(tape, weight, known), *added], {"transB": 1})
    if lowering.rounds(kind):
        assert state is not None
        matrix = IntegerMatrix(matrix_of(weight), kind, _TYPES[lowering.products])
        if matrix.kind == "int8":
            return integers.product(tape, state, *_parts(tape, weight, matrix), *(added or [None]))
    product = tape.op("MatMul", [state, _matrix(tape, weight, kind, _TYPES[lowering.products], known)])
    return tape.op("Add", [product, *added]) if added else product


def _matrix(tape: Tape, weight: ir.Value, kind: str, products: torch.dtype, known: Known) -> ir.Value:
    # [in, out], as MatMul wants it: a transposition after the DequantizeLinear would hide the pattern that readers look for.
    matrix = IntegerMatrix(matrix_of(weight), kind, products)
    if weight not in known:
        known[weight] = tape.op("DequantizeLinear", _parts(tape, weight, matrix), matrix.attributes)
        return known[weight]
    # A cut that asks the next layer's query and key multiplies by them once more. The numbers are the same, but they are written
    # out: NVIDIA's builder dies of quantized weights that two products share (TensorRT-RTX 1.7.1, fusing them).
    if known[weight].producer() is not None:
        known[weight] = tape.initializer(matrix.restored(f"{weight.name}.restored"))
    return known[weight]


def _parts(tape: Tape, weight: ir.Value, matrix: IntegerMatrix) -> list[ir.Value]:
    integers, scales = matrix.integers(f"{weight.name}.{matrix.kind}"), matrix.scales(f"{weight.name}.scales")
    return [tape.initializer(integers), tape.initializer(scales)]


def _cast(tape: Tape, value: ir.Value | None, known: Known) -> ir.Value:
    assert value is not None
    if value not in known:
        known[value] = tape.op("Cast", [value], {"to": ir.DataType.FLOAT16})
    return known[value]


def _halved(tape: Tape, value: ir.Value | None, known: Known) -> ir.Value:
    assert value is not None
    if value not in known:
        known[value] = tape.initializer(halved(value, f"{value.name}.fp16"))
    return known[value]


def _put(graph: ir.Graph, node: ir.Node, tape: Tape, value: ir.Value) -> None:
    # In place of a node; what it returned keeps its name, type and shape.
    old = node.outputs[0]
    value.type, value.shape = old.type, old.shape
    for initializer in tape.initializers:
        graph.register_initializer(initializer)
    ir.convenience.replace_nodes_and_values(graph, node, [node], list(tape.nodes), [old], [value])
