"""What an ONNX file says about its size: operators, the shapes and the bytes of the weights, read without the onnx package.

Only the protobuf fields that matter are followed (numbers as in onnx.proto); everything else, raw weights too, is stepped over.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeprune.errors import BundleError
from edgeprune.io.protobuf import Field, read_fields, read_integers

_GRAPH, _NODE, _INITIALIZER = 7, 1, 5  # of ModelProto; of GraphProto
_INPUT, _OPERATOR, _ATTRIBUTE = 1, 4, 5  # of NodeProto
_ATTRIBUTE_NAME, _INTEGER = 1, 3  # of AttributeProto
_DIMS, _TYPE, _NAME = 1, 2, 8  # of TensorProto
# Which inputs of an operator may be a weight that is multiplied, or is about to be; scales and biases are not.
_WEIGHT_INPUTS = {
    "MatMul": 2,
    "MatMulInteger": 2,
    "MatMulIntegerToFloat": 2,
    "DynamicQuantizeMatMul": 2,
    "MatMulNBits": 2,
    "Gemm": 2,
    "Conv": 2,
    "DequantizeLinear": 1,
    "Transpose": 1,
    "Cast": 1,
}
_PACKED = "MatMulNBits"  # of ONNX Runtime: its weight is a blob of bytes, whose matrix is K x N of the node's attributes
# Name and bits of TensorProto.DataType; of a type that is not here, the number and 8.
_TYPES = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    6: ("int32", 32),
    7: ("int64", 64),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    16: ("bfloat16", 16),
    21: ("uint4", 4),
    22: ("int4", 4),
    25: ("uint2", 2),
    26: ("int2", 2),
}

Node = tuple[str, list[str], dict[str, int]]  # operator, inputs, attributes that are integers


@dataclass(frozen=True)
class Graph:
    """How often a graph has each operator, the shapes (rank 2 and more) of the weights that its products read, and the bytes of
    all constants by type ("float32", "int8", "int4", ...), as the file holds them.
    """

    operators: Counter[str]
    weights: tuple[tuple[int, ...], ...]
    bytes: Mapping[str, float]

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return self.operators.total()

    @property
    def main_type(self) -> str:
        """The type that most bytes of the constants are of; "float32" of a graph without any."""
        return max(self.bytes, key=self.bytes.__getitem__, default="float32")


def read_graph(path: Path) -> Graph:
    """Read a graph's file; raise BundleError when it is no ONNX file."""
    data = path.read_bytes()
    try:
        start, end = next((start, end) for number, _, start, end in read_fields(data, 0, len(data)) if number == _GRAPH)
        return _graph(data, list(read_fields(data, start, end)))
    except (StopIteration, IndexError, ValueError) as error:
        raise BundleError(f"{path} is no ONNX file.", hint="Export the bundle again.") from error


def _graph(data: bytes, fields: list[Field]) -> Graph:
    operators: Counter[str] = Counter()
    multiplied: set[str] = set()
    packed: dict[str, tuple[int, ...]] = {}
    for number, _, start, end in fields:
        if number == _NODE:
            operator, inputs, integers = _node(data, start, end)
            operators[operator] += 1
            multiplied.update(inputs[: _WEIGHT_INPUTS.get(operator, 0)])
            if operator == _PACKED:
                packed[inputs[1]] = integers["K"], integers["N"]
    tensors = [_tensor(data, start, end) for number, _, start, end in fields if number == _INITIALIZER]
    stored: Counter[str] = Counter()
    for _, shape, kind in tensors:
        name, bits = _TYPES.get(kind, (f"type {kind}", 8))
        stored[name] += math.ceil(math.prod(shape) * bits / 8)
    shapes = ((name, packed.get(name, shape)) for name, shape, _ in tensors)
    return Graph(operators, tuple(shape for name, shape in shapes if name in multiplied and len(shape) > 1), stored)


def _node(data: bytes, start: int, end: int) -> Node:
    operator, inputs, integers = "", [], {}
    for number, _, first, last in read_fields(data, start, end):
        if number == _INPUT:
            inputs.append(data[first:last].decode())
        elif number == _OPERATOR:
            operator = data[first:last].decode()
        elif number == _ATTRIBUTE:
            integers.update(_integer(data, first, last))
    return operator, inputs, integers


def _integer(data: bytes, start: int, end: int) -> dict[str, int]:
    # An attribute's name and value where it is an integer.
    name, found = "", None
    for number, value, first, last in read_fields(data, start, end):
        if number == _ATTRIBUTE_NAME:
            name = data[first:last].decode()
        elif number == _INTEGER and not last:
            found = value
    return {} if found is None else {name: found}


def _tensor(data: bytes, start: int, end: int) -> tuple[str, tuple[int, ...], int]:
    name, kind, shape = "", 0, list[int]()
    for number, value, first, last in read_fields(data, start, end):
        if number == _NAME:
            name = data[first:last].decode()
        elif number == _TYPE:
            kind = value
        elif number == _DIMS:  # one, or several in one field, as some writers pack them
            shape += read_integers(data, first, last) if last else [value]
    return name, tuple(shape), kind
