"""Lower matrix products and weights to a precision, with dynamic quantization to 8 bits of the activations that meet int8 weights.

CPUs multiply int8 several times faster than float32: 3.5 times for 769 rows by 896 x 4864 on one AVX512-VNNI core (ONNX
Runtime 1.31, DynamicQuantizeMatMul; MatMulNBits with 8 bits 1.7 times). The graph has standard ONNX operators, which ONNX Runtime
fuses into that node.

All rows share one quantization range. After a norm, rows have similar magnitudes. Elsewhere single tokens may be a thousand times
larger than the rest (Sun et al., Massive Activations in Large Language Models, arXiv 2402.17762), so every row is first divided by
its largest magnitude, and its products are scaled back. A row that is alone needs no scale beside that of its integers.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from edgeprune.checkpoint.packed import PackedMatrix
from edgeprune.export.passes.attention import one_row_branch
from edgeprune.export.passes.replacement import replace_nodes
from edgeprune.export.passes.weights import IntegerMatrix, OwnIntegers, SmoothedMatrix, as_type, matrix_of
from edgeprune.lint.operator_support import DYNAMIC_FP4
from edgeprune.model.nvfp4 import BLOCK
from edgeprune.model.quantization import NARROW, TYPES
from edgeprune.model.smoothquant import Rounding
from edgeprune.targets import Lowering

Lowered = dict[ir.Value, ir.Value]  # maps traced values to their lowered versions
_FLOATS = {kind: name for name, kind in NARROW.items()}
_CASTS = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}
_ZEROS = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}  # their type is that of the rounded inputs
_NORMS = ("RMSNormalization", "LayerNormalization", "SkipSimplifiedLayerNormalization")
_MIN_SCALE = 1e-20  # divisor of rows of zeros
TENSORRT = "trt"  # the domain of TensorRT's own operators, as NVIDIA's ModelOpt writes them


def lower_table(graph: ir.Graph, lowering: Lowering) -> None:
    """Lower the precision of a graph's embedding table; the embeddings stay float32."""
    kind = lowering.weights_of("embedding")
    if kind == "fp32":
        return
    (gather,) = (node for node in graph if node.op_type == "Gather")
    tape, (table, ids) = Tape(), gather.inputs
    assert table is not None
    if kind in NARROW:
        rows = tape.op("Gather", [_narrowed(tape, table, {}, kind), ids])
        replace_nodes(graph, gather, [gather], tape, {gather.outputs[0]: tape.op("Cast", [rows], {"to": ir.DataType.FLOAT})})
        return
    integers, scales = _parts(tape, table, IntegerMatrix(matrix_of(table), kind, torch.float32, table=True))
    last = tape.initializer(ir.tensor(np.array([-1], np.int64), name=f"{table.name}.last_axis"))
    rows = tape.op("Cast", [tape.op("Gather", [integers, ids])], {"to": ir.DataType.FLOAT})
    scaled = tape.op("Mul", [rows, tape.op("Unsqueeze", [tape.op("Gather", [scales, ids]), last])])
    replace_nodes(graph, gather, [gather], tape, {gather.outputs[0]: scaled})


def lower_products(graph: ir.Graph, lowering: Lowering, part: str) -> None:
    """Lower the precision of every matrix product of a graph. `part`: the part of the model, "layers", "vision" or "projector".

    Beside a projector, the products that select tokens stay in float32.
    """
    products = _Products(lowering, part)
    half = lowering.products != "float32"
    for node in list(graph):
        # The decoder's products of activations already have the type of its KV cache.
        if node.op_type == "Gemm" and lowering.precision != "fp32":
            tape = Tape()
            value = products.linear(tape, node)
        elif node.op_type == "MatMul" and part == "vision" and half:
            tape = Tape()
            product = tape.op("MatMul", [products.half(tape, value) for value in node.inputs])
            value = tape.op("Cast", [product], {"to": ir.DataType.FLOAT})
        else:
            continue
        replace_nodes(graph, node, [node], tape, {node.outputs[0]: value})
    if any(node.domain == TENSORRT for node in graph):
        graph.opset_imports[TENSORRT] = 1
    _check_lowered(graph, lowering, part)


def _check_lowered(graph: ir.Graph, lowering: Lowering, part: str) -> None:
    # A layer that the exporter writes in another form would silently keep its weights in float32.
    if lowering.precision == "fp32":
        return
    remaining = [
        value.name
        for node in graph
        if node.op_type in ("Gemm", "MatMul", "Conv")
        for value in node.inputs
        if value is not None and value.const_value is not None and str(value.name).endswith(".weight")
        if not lowering.is_wide(part, str(value.name))
    ]
    assert not remaining, f"not lowered to {lowering.precision}: {remaining}"


class _Products:
    # Lowers the products of one graph; what several of them need is computed once.
    def __init__(self, lowering: Lowering, part: str) -> None:
        self._lowering, self._part = lowering, part
        self._type = TYPES[lowering.products]
        self._known: Lowered = {}
        self._sums: dict[tuple[ir.Value, int], ir.Value] = {}
        self._quantizer = DynamicQuantizer(steps=part == "layers")
        self._rounded: dict[tuple[ir.Value, float], ir.Value] = {}
        self._steps: dict[tuple[ir.Value, float, str], ir.Value] = {}
        self._in_blocks: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value]] = {}

    def half(self, tape: Tape, value: ir.Value | None) -> ir.Value:
        """Return an activation in the type of the products."""
        assert value is not None
        if value not in self._known:
            self._known[value] = tape.op("Cast", [value], {"to": _CASTS[self._type]})
        return self._known[value]

    def linear(self, tape: Tape, node: ir.Node) -> ir.Value:
        """Return the value of a linear layer in float32. The exporter writes it as Gemm with the weight [out, in]."""
        state, weight, *bias = node.inputs
        assert state is not None and weight is not None and weight.const_value is not None
        wide = self._lowering.is_wide(self._part, str(weight.name))
        products = torch.float32 if wide else self._type
        half = products is not torch.float32
        part = "head" if "lm_head" in str(weight.name) else self._part
        source = matrix_of(weight)
        rounding = source.rounding if isinstance(source, SmoothedMatrix) else None
        kind = self._lowering.weights_of(part, rounded=rounding is not None)
        if rounding is not None and rounding.kind == "nvfp4":
            state = self._in_4_bits(tape, state, rounding.scale, half=half)
        elif rounding is not None:
            state = self._in_8_bits(tape, state, rounding, products)
        elif half:
            state = self.half(tape, state)
        bias = [_narrowed(tape, value, self._known, _FLOATS[products]) if half else value for value in bias]
        if kind in NARROW and wide:
            return tape.op("Gemm", [state, weight, *bias], {"transB": 1})
        if kind in NARROW:
            product = tape.op("Gemm", [state, _narrowed(tape, weight, self._known, kind), *bias], {"transB": 1})
            return tape.op("Cast", [product], {"to": ir.DataType.FLOAT})
        matrix: IntegerMatrix | OwnIntegers = IntegerMatrix(source, kind, products)
        if isinstance(source, PackedMatrix) and (own := source.own_kind(self._lowering, part)):
            matrix = OwnIntegers(source, own, products)
        if matrix.kind == "int8" and self._lowering.rounds("int8"):
            return self._quantizer.product(tape, state, *_parts(tape, weight, matrix), *(bias or [None]))
        product, offset = self._product(tape, state, weight, matrix)
        product = tape.op("Add", [product, *bias]) if bias else product
        product = tape.op("Cast", [product], {"to": ir.DataType.FLOAT}) if half else product
        return product if offset is None else tape.op("Add", [product, offset])

    def _in_8_bits(self, tape: Tape, state: ir.Value, rounding: Rounding, products: torch.dtype) -> ir.Value:
        # Rounded with a fixed scale, and restored in the type of the products. Engines fuse this DequantizeLinear and that of the
        # weights with the MatMul behind them, so each product has its own. The float32 state is rounded as it is, and not first to
        # float16.
        scale = rounding.scale
        if (state, scale) not in self._rounded:
            step = tape.initializer(ir.tensor(np.array(scale, np.float32), name=f"{state.name}.scale"))
            zero = tape.initializer(ir.tensor(np.array(0, _ZEROS[rounding.kind]), name=f"{state.name}.zero_point"))
            self._rounded[state, scale] = tape.op("QuantizeLinear", [state, step, zero])
        rounded = self._rounded[state, scale]
        kind = str(products).removeprefix("torch.")
        if (state, scale, kind) not in self._steps:
            numbers = np.array(scale, kind)
            self._steps[state, scale, kind] = tape.initializer(ir.tensor(numbers, name=f"{state.name}.scale.{kind}"))
        return tape.op("DequantizeLinear", [rounded, self._steps[state, scale, kind]])

    def _in_4_bits(self, tape: Tape, state: ir.Value, scale: float, *, half: bool) -> ir.Value:
        # As ModelOpt writes it: the state in the type of the products becomes FP4 with FP8 scales, and each product restores both.
        key = state, half
        if key not in self._in_blocks:
            rows, name = (self.half(tape, state), f"{state.name}.half") if half else (state, str(state.name))
            of_all = tape.initializer(ir.tensor(np.array(scale, np.float32), name=f"{name}.fp4.scale"))
            settings = {"axis": -1, "block_size": BLOCK, "scale_type": ir.DataType.FLOAT8E4M3FN}
            numbers, scales = tape.op_multi_out(DYNAMIC_FP4, [rows, of_all], settings, num_outputs=2, domain=TENSORRT)
            # ONNX cannot infer what an operator of another makes.
            numbers.type, numbers.shape = ir.TensorType(ir.DataType.FLOAT4E2M1), state.shape
            scales.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
            self._in_blocks[key] = numbers, tape.op("DequantizeLinear", [scales, of_all])
        restored = tape.op("DequantizeLinear", self._in_blocks[key], {"axis": -1, "block_size": BLOCK})
        return tape.op("Cast", [restored], {"to": _CASTS[self._type]}) if half else restored

    def _product(
        self, tape: Tape, state: ir.Value, weight: ir.Value, matrix: IntegerMatrix | OwnIntegers
    ) -> tuple[ir.Value, ir.Value | None]:
        # The product without bias, and what is to be added for zero points in float32.
        if weight in self._known:
            # A cut that ranks by the next layer's query and key uses their weights a second time. The second copy is stored
            # dequantized, because NVIDIA's builder crashes while fusing two products with shared quantized weights (TensorRT-RTX
            # 1.7.1).
            if self._known[weight].producer() is not None:
                self._known[weight] = tape.initializer(matrix.restored(f"{weight.name}.restored"))
            return tape.op("MatMul", [state, self._known[weight]]), None
        parts, offset = _parts(tape, weight, matrix), None
        if isinstance(matrix, OwnIntegers):
            if matrix.order is not None:  # inputs that were quantized out of order are sorted by group
                order = tape.initializer(ir.tensor(matrix.order, name=f"{weight.name}.order"))
                state = tape.op("Gather", [state, order], {"axis": -1})
            if not matrix.symmetric and self._lowering.target.tensorrt is None:
                parts.append(tape.initializer(matrix.zero_points(f"{weight.name}.zero_points")))
            elif not matrix.symmetric:
                # TensorRT has no zero points. The sum of (q - z) s x over a group is that of q s x, less z s times the sum of x: a
                # product with one row for each group, in float32.
                offsets = tape.initializer(matrix.offsets(f"{weight.name}.offsets"))
                offset = tape.op("MatMul", [self._group_sums(tape, state, weight, matrix), offsets])
        # [in, out], as MatMul needs it: a Transpose after the DequantizeLinear would hide the pattern that engines match.
        restored = tape.op("DequantizeLinear", parts, matrix.attributes)
        if isinstance(matrix, IntegerMatrix) and matrix.in_float32:
            restored = tape.op("Cast", [restored], {"to": _CASTS[self._type]})
        self._known[weight] = restored
        return tape.op("MatMul", [state, self._known[weight]]), offset

    def _group_sums(self, tape: Tape, state: ir.Value, weight: ir.Value, matrix: OwnIntegers) -> ir.Value:
        # The sums of a state [tokens, in] over groups of inputs, in float32 [tokens, groups].
        key = state, matrix.groups
        if key not in self._sums:
            sizes = tape.initializer(ir.tensor(np.array([0, matrix.groups, -1], np.int64), name=f"{weight.name}.group_sizes"))
            last = tape.initializer(ir.tensor(np.array([-1], np.int64), name=f"{weight.name}.last_axis"))
            numbers = tape.op("Cast", [state], {"to": ir.DataType.FLOAT})
            self._sums[key] = tape.op("ReduceSum", [tape.op("Reshape", [numbers, sizes]), last], {"keepdims": 0})
        return self._sums[key]


def _parts(tape: Tape, weight: ir.Value, matrix: IntegerMatrix | OwnIntegers) -> list[ir.Value]:
    integers, scales = matrix.integers(f"{weight.name}.{matrix.kind}"), matrix.scales(f"{weight.name}.scales")
    values = [tape.initializer(integers), tape.initializer(scales)]
    if isinstance(matrix, IntegerMatrix) and matrix.kind == "nvfp4":
        values[1] = tape.op("DequantizeLinear", [values[1], tape.initializer(matrix.scale(f"{weight.name}.scale"))])
    return values


def _narrowed(tape: Tape, value: ir.Value | None, known: Lowered, kind: str) -> ir.Value:
    assert value is not None
    if value not in known:
        known[value] = tape.initializer(as_type(value, f"{value.name}.{kind}", NARROW[kind]))
    return known[value]


class DynamicQuantizer:
    """Writes the int8 products of one graph; a state that several matrices multiply is quantized once.

    `steps`: the graph often has one row, which then costs no more than it must.
    """

    def __init__(self, *, steps: bool = False) -> None:
        self._steps, self._one_row = steps, list[ir.Value]()
        self._quantized: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value, ir.Value | None]] = {}

    def product(self, tape: Tape, state: ir.Value, integers: ir.Value, scales: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Return `state` [..., in] times the matrix `integers` [in, out] times `scales` [out], plus `bias` [out]."""
        if state not in self._quantized:
            self._quantized[state] = self._quantize(tape, state)
        rows, scale, zero_point, row_scale = self._quantized[state]
        sums = tape.op("Cast", [tape.op("MatMulInteger", [rows, integers, zero_point])], {"to": ir.DataType.FLOAT})
        product = tape.op("Mul", [sums, tape.op("Mul", [scale, scales])])
        product = product if row_scale is None else tape.op("Mul", [product, row_scale])
        return product if bias is None else tape.op("Add", [product, bias])

    def _quantize(self, tape: Tape, state: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value | None]:
        producer, row_scale = state.producer(), None
        if producer is None or producer.op_type not in _NORMS or state is not producer.outputs[0]:
            last = tape.initializer(ir.tensor(np.array([-1], np.int64), name=f"{state.name}.last_axis"))
            least = tape.initializer(ir.tensor(np.array(_MIN_SCALE, np.float32), name=f"{state.name}.least"))
            alone = producer is not None and len(state.uses()) == 1
            if alone and producer is not None and one_row_branch(producer) is not None:
                state, row_scale = _divide_branches(tape, state, last, least)
            elif alone and producer is not None and producer.op_type == "Mul" and self._steps:
                state, row_scale = self._divide_several(tape, producer, last, least)
            else:
                state, row_scale = _divide_rows(tape, state, last, least)
        rows, scale, zero_point = tape.op_multi_out("DynamicQuantizeLinear", [state], num_outputs=3)
        return rows, scale, zero_point, row_scale

    def _divide_several(self, tape: Tape, node: ir.Node, last: ir.Value, least: ir.Value) -> tuple[ir.Value, ir.Value]:
        # Like `_divide_rows`, for the product of a Mul, if there are several rows. An If is cheaper than five small nodes.
        outer, state = Tape(), node.outputs[0]
        if not self._one_row:  # of the first layer, for all
            two = tape.initializer(ir.tensor(np.array([2], np.int64), name=f"{state.name}.two"))
            count = outer.op("Shape", [node.inputs[0]], {"start": 0, "end": 1})
            self._one_row.append(outer.op("Less", [count, two]))
        one = tape.initializer(ir.tensor(np.ones((1, 1), np.float32), name=f"{state.name}.one"))
        alone, several = Tape(), Tape()
        results = [
            (alone.op("Mul", node.inputs), alone.op("Identity", [one])),
            _divide_rows(several, several.op("Mul", node.inputs), last, least),
        ]
        branches = dict[str, ir.Graph]()
        for branch, written, (rows, scale) in zip(("then_branch", "else_branch"), (alone, several), results, strict=True):
            for number, value in enumerate(value for added_node in written.nodes for value in added_node.outputs):
                value.name = f"{state.name}_{branch}_{number}"
            rows.type, rows.shape = state.type, state.shape
            branches[branch] = ir.Graph([], [rows, scale], nodes=list(written.nodes), name=f"{state.name}_{branch}")
        divided, row_scale = outer.op_multi_out("If", self._one_row, branches, num_outputs=2)
        assert node.graph is not None
        replace_nodes(node.graph, node, [node], outer, {state: divided})
        return divided, row_scale


def _divide_rows(tape: Tape, state: ir.Value, last: ir.Value, least: ir.Value) -> tuple[ir.Value, ir.Value]:
    # Rows by their largest magnitudes, and these. Abs would first write a full copy, which takes twice as long.
    high, low = (tape.op(kind, [state, last], {"keepdims": 1}) for kind in ("ReduceMax", "ReduceMin"))
    row_scale = tape.op("Max", [high, tape.op("Neg", [low]), least])
    return tape.op("Div", [state, row_scale]), row_scale


def _divide_branches(tape: Tape, state: ir.Value, last: ir.Value, least: ir.Value) -> tuple[ir.Value, ir.Value]:
    # Like `_divide_rows`, in the branch of attention for several rows: one row alone needs no scale beside that of its integers.
    node = state.producer()
    assert node is not None and node.graph is not None
    row, several = one_row_branch(node), node.attributes["else_branch"].as_graph()
    assert row is not None
    one = tape.initializer(ir.tensor(np.ones((1, 1), np.float32), name=f"{state.name}.one"))
    single, rows = Tape(), Tape()
    scales = [single.op("Identity", [one])]
    divided, row_scale = _divide_rows(rows, several.outputs[0], last, least)
    for branch, added in ((row, single), (several, rows)):
        for number, value in enumerate(value for added_node in added.nodes for value in added_node.outputs):
            value.name = f"{branch.name}_scale_{number}"  # names of the outer graph are visible inside
        branch.extend(added.nodes)
    others = several.outputs[1:]
    row.outputs.extend(scales)
    several.outputs[:] = [divided, *others, row_scale]
    outer, branches = Tape(), {"then_branch": row, "else_branch": several}
    *values, row_scale = outer.op_multi_out("If", [node.inputs[0]], branches, num_outputs=len(several.outputs))
    replace_nodes(node.graph, node, [node], outer, dict(zip(node.outputs, values, strict=True)))
    return values[0], row_scale
