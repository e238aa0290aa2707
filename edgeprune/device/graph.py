"""What an ONNX file says about its size: operators and the shapes of the weights, read without the onnx package.

Only the protobuf fields that matter are followed (numbers as in onnx.proto); everything else, raw weights too, is stepped over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeprune.errors import BundleError

_GRAPH, _NODE, _INITIALIZER = 7, 1, 5  # of ModelProto; of GraphProto
_INPUT, _OPERATOR = 1, 4  # of NodeProto
_DIMS, _NAME = 1, 8  # of TensorProto
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
# Which inputs of an operator may be a weight that is multiplied, or is about to be; scales and biases are not.
_WEIGHT_INPUTS = {"MatMul": 2, "Gemm": 2, "Conv": 2, "DequantizeLinear": 1, "Transpose": 1, "Cast": 1}

Field = tuple[int, int, int, int]  # number, value of a varint, start and end of what has a length


@dataclass(frozen=True)
class Graph:
    """How often a graph has each operator, and the shapes (rank 2 and more) of the weights that its products read."""

    operators: Counter[str]
    weights: tuple[tuple[int, ...], ...]

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return self.operators.total()


def read_graph(path: Path) -> Graph:
    """Read a graph's file; raise BundleError when it is no ONNX file."""
    data = path.read_bytes()
    try:
        start, end = next((start, end) for number, _, start, end in _fields(data, 0, len(data)) if number == _GRAPH)
        return _graph(data, list(_fields(data, start, end)))
    except (StopIteration, IndexError, ValueError) as error:
        raise BundleError(f"{path} is no ONNX file.", hint="Export the bundle again.") from error


def _graph(data: bytes, fields: list[Field]) -> Graph:
    operators: Counter[str] = Counter()
    multiplied: set[str] = set()
    for number, _, start, end in fields:
        if number == _NODE:
            operator, inputs = _node(data, start, end)
            operators[operator] += 1
            multiplied.update(inputs[: _WEIGHT_INPUTS.get(operator, 0)])
    tensors = [_tensor(data, start, end) for number, _, start, end in fields if number == _INITIALIZER]
    return Graph(operators, tuple(shape for name, shape in tensors if name in multiplied and len(shape) > 1))


def _node(data: bytes, start: int, end: int) -> tuple[str, list[str]]:
    operator, inputs = "", []
    for number, _, first, last in _fields(data, start, end):
        if number == _INPUT:
            inputs.append(data[first:last].decode())
        elif number == _OPERATOR:
            operator = data[first:last].decode()
    return operator, inputs


def _tensor(data: bytes, start: int, end: int) -> tuple[str, tuple[int, ...]]:
    name, shape = "", []
    for number, value, first, last in _fields(data, start, end):
        if number == _NAME:
            name = data[first:last].decode()
        elif number == _DIMS and first == last:
            shape.append(value)
        elif number == _DIMS:  # several in one field, as some writers pack them
            while first < last:
                value, first = _varint(data, first)
                shape.append(value)
    return name, tuple(shape)


def _fields(data: bytes, position: int, end: int) -> Iterator[Field]:
    while position < end:
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        value, start = 0, position
        if wire == _VARINT:
            value, position = _varint(data, position)
            start = position
        elif wire == _LENGTH:
            length, start = _varint(data, position)
            position = start + length
        elif wire in (_FIXED64, _FIXED32):
            position = start = position + (8 if wire == _FIXED64 else 4)
        else:
            raise ValueError(f"wire type {wire}")
        if position > end:
            raise ValueError("a field is longer than its message")
        yield number, value, start, position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while data[position] & 0x80:
        value |= (data[position] & 0x7F) << shift
        shift += 7
        position += 1
    return value | data[position] << shift, position + 1
