"""Lazy initializers: matrices that are converted piece by piece while a graph is written, so that only one is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from edgeprune.checkpoint.packed import PackedMatrix
from edgeprune.checkpoint.weights import InMemoryMatrix, Matrix
from edgeprune.model.gptq import FittedMatrix
from edgeprune.model.nvfp4 import scale_of_all
from edgeprune.model.quantization import BLOCKS, Quantized, blocks_of, kind_for, quantize, stored_type
from edgeprune.model.smoothquant import Rounding

_PIECE = 1 << 20  # elements converted at once; pieces that fit the CPU cache are several times faster
_KINDS = {
    "int8": ir.DataType.INT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "int4": ir.DataType.INT4,
    "nvfp4": ir.DataType.FLOAT4E2M1,
}
_PACKED = {"int4": ml_dtypes.int4, "nvfp4": ml_dtypes.float4_e2m1fn}  # types of 4 bits, which torch has not
_TYPES = {
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float32: ir.DataType.FLOAT,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
}


class LazyInitializer(ir.LazyTensor):
    """An initializer with the elements of a `matrix` in float32, float16 or bfloat16."""

    def __init__(self, matrix: Matrix, name: str, kind: torch.dtype = torch.float32) -> None:
        super().__init__(lambda: ir.tensor(np.concatenate(list(self._pieces()))), _TYPES[kind], ir.Shape(matrix.shape), name=name)
        self.matrix = matrix
        self._kind = kind

    def tofile(self, file: BinaryIO) -> None:
        """Write the elements to a file, piece by piece."""
        for piece in self._pieces():
            file.write(piece.view(np.uint8).data)  # bfloat16 is no type of Python's buffers

    def _pieces(self) -> Iterator[np.ndarray]:
        for rows in _pieces(self.matrix):
            yield np.ascontiguousarray(_array(rows.detach().to(self._kind)))


def matrix_of(value: ir.Value) -> Matrix:
    """Return the matrix of an initializer."""
    constant = value.const_value
    assert constant is not None
    return constant.matrix if isinstance(constant, LazyInitializer) else InMemoryMatrix(torch.from_numpy(constant.numpy()))


def as_type(value: ir.Value, name: str, kind: torch.dtype) -> ir.TensorProtocol:
    """Return an initializer converted to float16 or bfloat16."""
    constant = value.const_value
    assert constant is not None
    if isinstance(constant, LazyInitializer):
        return LazyInitializer(constant.matrix, name, kind)
    return ir.tensor(_array(torch.from_numpy(constant.numpy()).to(kind)), name=name)


def _array(tensor: torch.Tensor) -> np.ndarray:
    # NumPy has neither bfloat16 nor FP8 of its own.
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype is torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    array: np.ndarray = tensor.numpy()
    return array


@dataclass(frozen=True)
class StackedMatrix:
    """Matrices with the same number of columns, one below the other."""

    parts: tuple[Matrix, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """The rows of all, and the columns of each."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the rows from `start` to `stop`."""
        return torch.cat([part.rows(*span) for part, span in self.within(start, stop)])

    def within(self, start: int, stop: int) -> Iterator[tuple[Matrix, tuple[int, int]]]:
        """Yield the parts between `start` and `stop`, each with the span of its own rows."""
        first = 0
        for part in self.parts:
            begin, end = max(start - first, 0), min(stop - first, part.shape[0])
            if begin < end:
                yield part, (begin, end)
            first += part.shape[0]


@dataclass(frozen=True)
class SmoothedMatrix:
    """A matrix times its smoothing factors, whose inputs are rounded to 8 or 4 bits."""

    matrix: Matrix
    rounding: Rounding

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.matrix.shape

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the rows from `start` to `stop` [stop - start, in]."""
        return self.rounding.weights(self.matrix.rows(start, stop))


class IntegerMatrix:
    """A matrix quantized here, as the initializers of a DequantizeLinear, transposed to [in, out] as MatMul needs it.

    An int8 embedding table (`table`) is not transposed. Integers and scales come from one computation, which runs when the integers
    are written; the scales are held until they are written too.
    """

    def __init__(self, matrix: Matrix, kind: str, products: torch.dtype, *, table: bool = False) -> None:
        self._matrix, self._products, self._table = matrix, products, table
        self._scales: torch.Tensor | None = None
        self.kind = kind_for(matrix.shape[1], kind)
        self._blocks = blocks_of(matrix.shape[1], self.kind)
        self._scale_type = stored_type("nvfp4") if self.kind == "nvfp4" else products

    @property
    def attributes(self) -> dict[str, int]:
        """The attributes of the DequantizeLinear."""
        return {"axis": 0, "block_size": BLOCKS[self.kind]} if self.kind in BLOCKS else {"axis": 1}

    @property
    def in_float32(self) -> bool:
        """Whether the DequantizeLinear gives float32, the type of nvfp4's scale of all blocks, for products in another type."""
        return self.kind == "nvfp4" and self._products is not torch.float32

    def integers(self, name: str) -> ir.TensorProtocol:
        """Return the integers, or FP8 or FP4 numbers, [in, out]; [out, in] for a table."""
        return ir.LazyTensor(
            self._quantize, _KINDS[self.kind], ir.Shape(self._matrix.shape[:: 1 if self._table else -1]), name=name
        )

    def scales(self, name: str) -> ir.TensorProtocol:
        """Return the scales: [blocks, out] for int4 and nvfp4, else [out]."""
        outputs = self._matrix.shape[0]
        shape = (self._blocks, outputs) if self.kind in BLOCKS else (outputs,)
        return ir.LazyTensor(self._take_scales, _TYPES[self._scale_type], ir.Shape(shape), name=name)

    def scale(self, name: str) -> ir.TensorProtocol:
        """Return nvfp4's scale of all blocks, a float32 number."""
        return ir.LazyTensor(
            lambda: ir.tensor(np.array(scale_of_all(self._largest), np.float32)), ir.DataType.FLOAT, ir.Shape(()), name=name
        )

    def restored(self, name: str) -> ir.TensorProtocol:
        """Return the dequantized matrix [in, out]."""
        shape = ir.Shape(self._matrix.shape[::-1])
        return ir.LazyTensor(self._dequantize, _TYPES[self._products], shape, name=name)

    def _quantize(self) -> ir.TensorProtocol:
        outputs, inputs = self._matrix.shape
        kind = stored_type(self.kind)
        integers = torch.empty(outputs, inputs, dtype=kind) if self._table else torch.empty(inputs, outputs, dtype=kind).T
        scales = torch.empty(self._blocks, outputs, dtype=self._scale_type)
        for start, piece in self._quantized_pieces():
            integers[start : start + len(piece.values)] = piece.values
            scales[:, start : start + len(piece.values)] = piece.scales.T
        self._scales = scales
        numbers = _array(integers if self._table else integers.T)
        return ir.tensor(numbers.astype(_PACKED[self.kind]) if self.kind in _PACKED else numbers)

    def _take_scales(self) -> ir.TensorProtocol:
        if self._scales is None:
            self._quantize()
        assert self._scales is not None
        scales, self._scales = self._scales, None
        return ir.tensor(_array(scales if self.kind in BLOCKS else scales[0]))

    def _dequantize(self) -> ir.TensorProtocol:
        outputs, inputs = self._matrix.shape
        result = torch.empty(inputs, outputs, dtype=self._products)
        for start, piece in self._quantized_pieces():
            result[:, start : start + len(piece.values)] = piece.restored().T
        return ir.tensor(result.numpy())

    def _quantized_pieces(self) -> Iterator[tuple[int, Quantized]]:
        largest = self._largest if self.kind == "nvfp4" else None
        return (
            (start, _quantized(self._matrix, start, stop, self.kind, self._products, largest))
            for start, stop in _spans(self._matrix)
        )

    @cached_property
    def _largest(self) -> float:
        return max(float(rows.abs().max()) for rows in _pieces(self._matrix))


class OwnIntegers:
    """The integers and scales of a quantized checkpoint, bit for bit, in the form of an IntegerMatrix.

    `order`: the permutation of the inputs that sorts them by group [in], if there is one; rows of the integers are sorted so.
    """

    def __init__(self, matrix: PackedMatrix, kind: str, products: torch.dtype) -> None:
        self._matrix, self._products, self.kind = matrix, products, kind
        self.order = None if matrix.order is None else matrix.order.numpy()
        self.symmetric = matrix.symmetric
        self.groups = matrix.groups

    @property
    def attributes(self) -> dict[str, int]:
        """The attributes of the DequantizeLinear."""
        return {"axis": 0, "block_size": self._matrix.block} if self.kind == "int4" else {"axis": 1}

    def integers(self, name: str) -> ir.TensorProtocol:
        """Return the integers [in, out] less 8 (int4) or 128 (int8)."""
        kind = ir.DataType.INT4 if self.kind == "int4" else ir.DataType.INT8
        return ir.LazyTensor(self._integers, kind, ir.Shape(self._matrix.shape[::-1]), name=name)

    def scales(self, name: str) -> ir.TensorProtocol:
        """Return the scales: [blocks, out] for int4, [out] for int8."""
        return ir.LazyTensor(self._block_scales, _TYPES[self._products], ir.Shape(self._scale_shape()), name=name)

    def zero_points(self, name: str) -> ir.TensorProtocol:
        """Return the zero points less 8 [blocks, out]."""
        return ir.LazyTensor(self._zero_points, ir.DataType.INT4, ir.Shape(self._scale_shape()), name=name)

    def offsets(self, name: str) -> ir.TensorProtocol:
        """Return what the zero points take from every weight of a group, in float32 [groups, out]."""
        return ir.LazyTensor(self._offsets, ir.DataType.FLOAT, ir.Shape((self.groups, self._matrix.shape[0])), name=name)

    def restored(self, name: str) -> ir.TensorProtocol:
        """Return the dequantized matrix [in, out], inputs in their own order."""
        return ir.LazyTensor(self._dequantize, _TYPES[self._products], ir.Shape(self._matrix.shape[::-1]), name=name)

    def _scale_shape(self) -> tuple[int, ...]:
        outputs, inputs = self._matrix.shape
        return (inputs // self._matrix.block, outputs) if self.kind == "int4" else (outputs,)

    def _integers(self) -> ir.TensorProtocol:
        outputs, inputs = self._matrix.shape
        integers = np.empty((inputs, outputs), np.int8)
        for start, stop in _spans(self._matrix):
            integers[:, start:stop] = self._matrix.integers(start, stop).T.numpy()
        return ir.tensor(integers.astype(ml_dtypes.int4) if self.kind == "int4" else integers)

    def _block_scales(self) -> ir.TensorProtocol:
        return ir.tensor(self._by_block(self._matrix.scales().to(self._products)).view(self._scale_shape()).numpy())

    def _zero_points(self) -> ir.TensorProtocol:
        return ir.tensor(self._by_block(self._matrix.zero_points()).numpy().astype(ml_dtypes.int4))

    def _by_block(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers.repeat_interleave(self._matrix.group // self._matrix.block, dim=0) if self.kind == "int4" else numbers

    def _offsets(self) -> ir.TensorProtocol:
        return ir.tensor((-self._matrix.zero_points() * self._matrix.scales().float()).numpy())

    def _dequantize(self) -> ir.TensorProtocol:
        outputs, inputs = self._matrix.shape
        result = torch.empty(inputs, outputs, dtype=self._products)
        for start, stop in _spans(self._matrix):
            result[:, start:stop] = self._matrix.rows(start, stop).T
        return ir.tensor(result.numpy())


def _quantized(matrix: Matrix, start: int, stop: int, kind: str, products: torch.dtype, largest: float | None = None) -> Quantized:
    if isinstance(matrix, FittedMatrix):
        return matrix.quantized(start, stop)
    if not isinstance(matrix, StackedMatrix):
        return quantize(matrix.rows(start, stop), kind, products, largest)
    parts = [_quantized(part, *span, kind, products) for part, span in matrix.within(start, stop)]
    return Quantized(kind, torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts]))


def _pieces(matrix: Matrix) -> Iterator[torch.Tensor]:
    return (matrix.rows(start, stop) for start, stop in _spans(matrix))


def _spans(matrix: Matrix) -> Iterator[tuple[int, int]]:
    rows, columns = matrix.shape
    step = max(_PIECE // columns, 1)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))
