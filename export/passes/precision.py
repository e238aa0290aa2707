"""Products of integers: what meets int8 weights is rounded to 8 bits where the graph runs, by its own range (dynamic quantization).

CPUs multiply int8 several times faster than float32: 3.5 times for 769 rows by 896 x 4864 on one AVX512-VNNI core (ONNX
Runtime 1.31, DynamicQuantizeMatMul; MatMulNBits with 8 bits 1.7 times). The operators are ONNX's own, of which ONNX Runtime makes
that node.

One range serves all rows. Behind a norm they are alike; elsewhere single tokens may be a thousand times larger than the rest (Sun
et al., Massive Activations in Large Language Models, arXiv 2402.17762), so every row is scaled to 1 first, and its products back.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from edgeprune.export.passes.replacement import replace_nodes
from edgeprune.export.passes.weights import IntegerMatrix, as_fp16, matrix_of
from edgeprune.targets import Lowering

Known = dict[ir.Value, ir.Value]  # what was lowered already, and to what
_TYPES = {"float16": torch.float16, "float32": torch.float32}

_NORMS = ("RMSNormalization", "LayerNormalization")
_SMALLEST = 1e-20  # a row of zeros is divided by this


def lower_table(graph: ir.Graph, lowering: Lowering) -> None:
    """Give the embedding table of a graph the precision of a lowering; what is looked up stays float32."""
    kind = lowering.weights_of("embedding")
    if kind == "fp32":
        return
    (gather,) = (node for node in graph if node.op_type == "Gather")
    tape, (table, ids) = Tape(), gather.inputs
    assert table is not None
    if kind == "fp16":
        rows = tape.op("Gather", [_halved(tape, table, {}), ids])
        replace_nodes(graph, gather, [gather], tape, {gather.outputs[0]: tape.op("Cast", [rows], {"to": ir.DataType.FLOAT})})
        return
    integers, scales = _parts(tape, table, IntegerMatrix(matrix_of(table), kind, torch.float32, table=True))
    last = tape.initializer(ir.tensor(np.array([-1], np.int64), name=f"{table.name}.last_axis"))
    rows = tape.op("Cast", [tape.op("Gather", [integers, ids])], {"to": ir.DataType.FLOAT})
    scaled = tape.op("Mul", [rows, tape.op("Unsqueeze", [tape.op("Gather", [scales, ids]), last])])
    replace_nodes(graph, gather, [gather], tape, {gather.outputs[0]: scaled})


def lower_products(graph: ir.Graph, lowering: Lowering, part: str) -> None:
    """Give every matrix product of a graph the precision of a lowering; `part`: whose matrices they are, "layers" or "vision"."""
    known: Known = {}
    integers = DynamicQuantizer()
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
        value = tape.op("Cast", [product], {"to": ir.DataType.FLOAT}) if half else product
        replace_nodes(graph, node, [node], tape, {node.outputs[0]: value})
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


def _linear(tape: Tape, node: ir.Node, lowering: Lowering, part: str, known: Known, integers: DynamicQuantizer) -> ir.Value:
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
        known[value] = tape.initializer(as_fp16(value, f"{value.name}.fp16"))
    return known[value]


class DynamicQuantizer:
    """The products of one graph: states that several matrices meet are rounded once."""

    def __init__(self) -> None:
        self._rounded: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value, ir.Value | None]] = {}

    def product(self, tape: Tape, state: ir.Value, integers: ir.Value, scales: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Return the product of `state` [..., in] and a matrix: `integers` [in, out] times `scales` [out]; with `bias` [out]."""
        if state not in self._rounded:
            self._rounded[state] = _rounded(tape, state)
        rows, scale, zero, size = self._rounded[state]
        whole = tape.op("Cast", [tape.op("MatMulInteger", [rows, integers, zero])], {"to": ir.DataType.FLOAT})
        product = tape.op("Mul", [whole, tape.op("Mul", [scale, scales])])
        product = product if size is None else tape.op("Mul", [product, size])
        return product if bias is None else tape.op("Add", [product, bias])


def _rounded(tape: Tape, state: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value | None]:
    producer, size = state.producer(), None
    if producer is None or producer.op_type not in _NORMS:
        last = tape.initializer(ir.tensor(np.array([-1], np.int64), name=f"{state.name}.last_axis"))
        least = tape.initializer(ir.tensor(np.array(_SMALLEST, np.float32), name=f"{state.name}.least"))
        # The largest magnitude of each row; Abs would write it all down first, which takes twice as long.
        high, low = (tape.op(kind, [state, last], {"keepdims": 1}) for kind in ("ReduceMax", "ReduceMin"))
        size = tape.op("Max", [high, tape.op("Neg", [low]), least])
        state = tape.op("Div", [state, size])
    rows, scale, zero = tape.op_multi_out("DynamicQuantizeLinear", [state], num_outputs=3)
    return rows, scale, zero, size
