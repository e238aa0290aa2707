"""Graphs of one matrix product, written byte by byte: the onnx package is not among the runtime's dependencies.

Numbers of the fields as in onnx.proto; `edgeprune.device.graph` reads what is written here.
"""

from __future__ import annotations

import numpy as np

_FLOAT, _INT8, _INT32, _FLOAT16 = 1, 3, 6, 10  # of TensorProto.DataType
_IR_VERSION, _OPSET = 8, 17  # the oldest that ONNX Runtime 1.20 and later read without a word

# By arithmetic: the type of the weight and of the input, those of the product, and its nodes as (operator, inputs, outputs).
_PRODUCTS = {
    "fp32": (np.float32, _FLOAT, _FLOAT, _FLOAT, [("MatMul", "xw", "y")]),
    "fp16": (np.float16, _FLOAT16, _FLOAT16, _FLOAT16, [("MatMul", "xw", "y")]),
    "int8": (np.int8, _INT8, _FLOAT, _INT32, [("DynamicQuantizeLinear", "x", "qsz"), ("MatMulInteger", "qwz", "y")]),
}


def product_graph(arithmetic: str, rows: int, inner: int, columns: int) -> bytes:
    """Return an ONNX model that multiplies its input "x" [rows, inner] by a constant [inner, columns] into "y".

    "int8" quantizes x to uint8 as it comes; the constant is int8 and y int32. "fp32" and "fp16" are of one type throughout.
    """
    kind, constant, given, product, nodes = _PRODUCTS[arithmetic]
    drawn = np.random.default_rng(0).integers(-60, 60, (inner, columns), np.int8).astype(kind)
    graph = b"".join(_message(1, _node(*node)) for node in nodes) + _message(2, b"product")
    graph += _message(5, _integers(1, inner, columns) + _integers(2, constant) + _message(8, b"w") + _message(9, drawn.tobytes()))
    graph += _message(11, _value("x", given, rows, inner)) + _message(12, _value("y", product, rows, columns))
    return _integers(1, _IR_VERSION) + _message(7, graph) + _message(8, _message(1, b"") + _integers(2, _OPSET))


def _node(operator: str, inputs: str, outputs: str) -> bytes:
    names = [_message(1, name.encode()) for name in inputs] + [_message(2, name.encode()) for name in outputs]
    return b"".join(names) + _message(4, operator.encode())


def _value(name: str, kind: int, *sizes: int) -> bytes:
    shape = b"".join(_message(1, _integers(1, size)) for size in sizes)
    return _message(1, name.encode()) + _message(2, _message(1, _integers(1, kind) + _message(2, shape)))


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _integers(number: int, *values: int) -> bytes:
    return b"".join(_varint(number << 3) + _varint(value) for value in values)


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*written, value))
