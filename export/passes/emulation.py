"""A graph with NVFP4 in plain operators, on the same weights, for ONNX Runtime.

ONNX Runtime's CPU has no FP4 (1.31.1: neither Cast nor DequantizeLinear takes FLOAT4E2M1) and no operators of TensorRT. So what
they compute is written out in float32, as `edgeprune.model.nvfp4` computes it: stored numbers are read as UINT4, whose bits are the
same, and looked up in the table of E2M1's 16 numbers; activations get the scales of their blocks and are rounded. All else is
unchanged. What depends on weights alone is computed once, when ONNX Runtime opens the graph.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeprune.export.passes.precision import TENSORRT
from edgeprune.export.passes.replacement import replace_nodes
from edgeprune.lint.operator_support import DYNAMIC_FP4
from edgeprune.model.nvfp4 import BLOCK, LARGEST, SCALES

_NUMBERS = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)  # of E2M1 by their bits


def write_emulated(path: Path, emulated: Path) -> bool:
    """Write the graph at `path` without FP4 to `emulated` in the same folder; return False, without a file, if it has none."""
    model = ir.load(path)
    writer = _Writer(model.graph)
    for node in list(model.graph):
        if node.op_type == DYNAMIC_FP4:
            writer.replace_activation(node)
        elif node.op_type == "DequantizeLinear" and _is_fp4(node.inputs[0]):
            writer.replace_weight(node)
    if not writer.changed:
        return False
    model.graph.opset_imports.pop(TENSORRT, None)
    ir.save(model, emulated)
    return True


def _is_fp4(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.dtype == ir.DataType.FLOAT4E2M1


def _bits(stored: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    # The same bytes as UINT4. ONNX has small tensors in the graph, and the others in the file beside it.
    if not isinstance(stored, ir.ExternalTensor):
        return ir.tensor(stored.numpy().view(ml_dtypes.uint4), name=name)
    place = stored.location, stored.offset, stored.length
    return ir.ExternalTensor(*place, ir.DataType.UINT4, shape=stored.shape, name=name, base_dir=stored.base_dir)


class _Writer:
    # Writes one graph; constants that many products need are registered once.
    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self.changed = graph, False
        self._constants: dict[str, ir.Value] = {}

    def replace_activation(self, node: ir.Node) -> None:
        """Replace a dynamic quantization [..., n], and the nodes that restore what it makes."""
        state, of_all = node.inputs
        numbers, scales = node.outputs
        assert state is not None and of_all is not None and numbers.shape is not None and isinstance(numbers.shape[-1], int)
        width, tape = numbers.shape[-1], Tape()
        in_blocks = self._constant(tape, f"fp4.blocks.{width}", np.array([-1, width // BLOCK, BLOCK], np.int64))
        in_rows = self._constant(tape, f"fp4.rows.{width}", np.array([-1, width], np.int64))
        blocks = tape.op("Reshape", [tape.op("Cast", [state], {"to": ir.DataType.FLOAT}), in_blocks])
        step = tape.op("Mul", [self._scales(tape, blocks, of_all), of_all])
        rounded = self._rounded(tape, tape.op("Div", [blocks, step]))
        restored = tape.op("Reshape", [tape.op("Mul", [rounded, step]), in_rows])
        (scaled,) = scales.consumers()
        readers = [user for user, _ in numbers.uses()]
        assert all(user.op_type == "DequantizeLinear" for user in (scaled, *readers))
        for reader in readers:
            reader.outputs[0].replace_all_uses_with(restored)
        restored.name = f"{numbers.name}.restored"
        replace_nodes(self._graph, node, [node, scaled, *readers], tape, {})
        self.changed = True

    def replace_weight(self, node: ir.Node) -> None:
        """Replace the DequantizeLinear of stored numbers [in, out], and that of its scales."""
        numbers, scales = node.inputs
        scaled = None if scales is None else scales.producer()
        assert numbers is not None and scaled is not None
        stored, (block_scales, of_all) = numbers.const_value, scaled.inputs
        assert stored is not None
        height, tape = stored.shape.numpy()[0], Tape()
        table = self._constant(tape, "fp4.numbers", _NUMBERS)
        index = tape.op("Cast", [tape.initializer(_bits(stored, f"{numbers.name}.bits"))], {"to": ir.DataType.INT32})
        in_blocks = self._constant(tape, f"fp4.weights.{height}", np.array([height // BLOCK, BLOCK, -1], np.int64))
        in_rows = self._constant(tape, f"fp4.weight.{height}", np.array([height, -1], np.int64))
        second = self._constant(tape, "fp4.second", np.array([1], np.int64))
        steps = tape.op("Mul", [tape.op("Cast", [block_scales], {"to": ir.DataType.FLOAT}), of_all])
        values = tape.op("Reshape", [tape.op("Gather", [table, index]), in_blocks])
        restored = tape.op("Reshape", [tape.op("Mul", [values, tape.op("Unsqueeze", [steps, second])]), in_rows])
        replace_nodes(self._graph, node, [node, scaled], tape, {node.outputs[0]: restored})
        self._graph.initializers.pop(str(numbers.name))
        self.changed = True

    def _scales(self, tape: Tape, blocks: ir.Value, of_all: ir.Value) -> ir.Value:
        # The scales of blocks, rounded to FP8, in float32 [..., 1].
        assert of_all.const_value is not None
        last = self._constant(tape, "fp4.last", np.array([-1], np.int64))
        largest = of_all.const_value.numpy() * np.float32(LARGEST)
        limit = self._constant(tape, f"{of_all.name}.largest", largest)
        least, most = (self._constant(tape, f"fp4.scale.{each}", np.array(each, np.float32)) for each in SCALES)
        peaks = tape.op("ReduceMax", [tape.op("Abs", [blocks]), last], {"keepdims": 1})
        ratios = tape.op("Clip", [tape.op("Div", [peaks, limit]), least, most])
        rounded = tape.op("Cast", [ratios], {"to": ir.DataType.FLOAT8E4M3FN})
        return tape.op("Cast", [rounded], {"to": ir.DataType.FLOAT})

    def _rounded(self, tape: Tape, numbers: ir.Value) -> ir.Value:
        # E2M1 has steps of a half below 2, of 1 below 4, and of 2.
        half, one, two, four = (self._constant(tape, f"fp4.{each}", np.array(each, np.float32)) for each in (0.5, 1.0, 2.0, 4.0))
        least, most = (self._constant(tape, f"fp4.limit.{each}", np.array(each, np.float32)) for each in (-LARGEST, LARGEST))
        sizes = tape.op("Abs", [numbers])
        steps = tape.op("Where", [tape.op("Less", [sizes, four]), one, two])
        steps = tape.op("Where", [tape.op("Less", [sizes, two]), half, steps])
        rounded = tape.op("Mul", [tape.op("Round", [tape.op("Div", [numbers, steps])]), steps])
        return tape.op("Clip", [rounded, least, most])

    def _constant(self, tape: Tape, name: str, numbers: np.ndarray) -> ir.Value:
        if name not in self._constants:
            self._constants[name] = tape.initializer(ir.tensor(numbers, name=name))
        return self._constants[name]
