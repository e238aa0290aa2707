"""Read operator counts and the shapes and sizes of weights from an ONNX file, without the onnx package.

Only the necessary protobuf fields are parsed (numbers as in onnx.proto). Everything else, raw weights included, is skipped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeprune.errors import BundleError
from edgeprune.io.protobuf import Field, read_fields, read_integers

_GRAPH, _NODE, _INITIALIZER = 7, 1, 5  # of ModelProto; the others of GraphProto
_INPUT, _OUTPUT, _OPERATOR, _ATTRIBUTE = 1, 2, 4, 5  # of NodeProto
_ATTRIBUTE_NAME, _INTEGER, _BODY = 1, 3, 6  # of AttributeProto
_DIMS, _TYPE, _NAME = 1, 2, 8  # of TensorProto
_DEQUANTIZE, _SCALE = "DequantizeLinear", 1  # an operator, and the index of its scale
# Number of leading inputs of an operator that can be the weight of a matrix product; scales and biases cannot.
_WEIGHT_INPUTS = {
    "MatMul": 2,
    "MatMulInteger": 2,
    "MatMulIntegerToFloat": 2,
    "DynamicQuantizeMatMul": 2,
    "MatMulNBits": 2,
    "Gemm": 2,
    "Conv": 2,
    _DEQUANTIZE: 1,
    "Transpose": 1,
    "Cast": 1,
}
_PACKED = "MatMulNBits"  # ONNX Runtime's operator; its weight is stored as bytes, and attributes K and N give the shape
# Name and bits of each TensorProto.DataType; other types count as 8 bits.
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
    17: ("float8_e4m3fn", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
    23: ("float4_e2m1", 4),
    25: ("uint2", 2),
    26: ("int2", 2),
}

Node = tuple[str, list[str], list[str], dict[str, int]]  # operator, inputs, outputs, integer attributes


@dataclass(frozen=True)
class Graph:
    """Contents of a graph, the bodies of its Scans and Ifs included.

    `operators`: number of nodes by operator. `weights`: shapes (rank 2 and more) of the weights of matrix products. `bytes`: stored
    bytes of all constants by type ("float32", "int8", "int4", ...).
    """

    operators: Counter[str]
    weights: tuple[tuple[int, ...], ...]
    bytes: Mapping[str, float]

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.operators.total()

    @property
    def main_type(self) -> str:
        """The type with the most bytes of constants; "float32" if there are none."""
        return max(self.bytes, key=self.bytes.__getitem__, default="float32")


def read_graph(path: Path) -> Graph:
    """Read an ONNX file; raise BundleError if it is malformed."""
    data = path.read_bytes()
    try:
        start, end = next((start, end) for number, _, start, end in read_fields(data, 0, len(data)) if number == _GRAPH)
        return _parse_graph(data, list(read_fields(data, start, end)))
    except (StopIteration, IndexError, ValueError) as error:
        raise BundleError(f"{path} is no ONNX file.", hint="Export the bundle again.") from error


def _parse_graph(data: bytes, fields: list[Field]) -> Graph:
    operators: Counter[str] = Counter()
    multiplied: set[str] = set()
    packed: dict[str, tuple[int, ...]] = {}
    parts = [field for graph in _with_bodies(data, fields) for field in graph]
    nodes = [_parse_node(data, start, end) for number, _, start, end in parts if number == _NODE]
    scales = {inputs[_SCALE] for operator, inputs, _, _ in nodes if operator == _DEQUANTIZE}
    for operator, inputs, outputs, integers in nodes:
        operators[operator] += 1
        if not scales.intersection(outputs):  # NVFP4 has scales of scales
            multiplied.update(inputs[: _WEIGHT_INPUTS.get(operator, 0)])
        if operator == _PACKED:
            packed[inputs[1]] = integers["K"], integers["N"]
    tensors = [_parse_tensor(data, start, end) for number, _, start, end in parts if number == _INITIALIZER]
    stored: Counter[str] = Counter()
    for _, shape, kind in tensors:
        name, bits = _TYPES.get(kind, (f"type {kind}", 8))
        stored[name] += math.ceil(math.prod(shape) * bits / 8)
    shapes = ((name, packed.get(name, shape)) for name, shape, _ in tensors)
    return Graph(operators, tuple(shape for name, shape in shapes if name in multiplied and len(shape) > 1), stored)


def _with_bodies(data: bytes, fields: list[Field]) -> Iterator[list[Field]]:
    # The fields of a graph, and those of the bodies of its nodes.
    yield fields
    for start, end in ((start, end) for number, _, start, end in fields if number == _NODE):
        for first, last in ((first, last) for number, _, first, last in read_fields(data, start, end) if number == _ATTRIBUTE):
            for number, _, *body in read_fields(data, first, last):
                if number == _BODY:
                    yield from _with_bodies(data, list(read_fields(data, *body)))


def _parse_node(data: bytes, start: int, end: int) -> Node:
    operator, inputs, outputs, integers = "", [], [], {}
    for number, _, first, last in read_fields(data, start, end):
        if number == _INPUT:
            inputs.append(data[first:last].decode())
        elif number == _OUTPUT:
            outputs.append(data[first:last].decode())
        elif number == _OPERATOR:
            operator = data[first:last].decode()
        elif number == _ATTRIBUTE:
            integers.update(_parse_integer_attribute(data, first, last))
    return operator, inputs, outputs, integers


def _parse_integer_attribute(data: bytes, start: int, end: int) -> dict[str, int]:
    # Name and value of an integer attribute; empty for other types.
    name, found = "", None
    for number, value, first, last in read_fields(data, start, end):
        if number == _ATTRIBUTE_NAME:
            name = data[first:last].decode()
        elif number == _INTEGER and not last:
            found = value
    return {} if found is None else {name: found}


def _parse_tensor(data: bytes, start: int, end: int) -> tuple[str, tuple[int, ...], int]:
    name, kind, shape = "", 0, list[int]()
    for number, value, first, last in read_fields(data, start, end):
        if number == _NAME:
            name = data[first:last].decode()
        elif number == _TYPE:
            kind = value
        elif number == _DIMS:  # one per field, or packed
            shape += read_integers(data, first, last) if last else [value]
    return name, tuple(shape), kind
