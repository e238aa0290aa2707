"""Ranges of dynamic dimensions, given as names or expressions such as `text + 2*image - 1`, and constant folding.

torch's exporter writes computed dimensions as expressions over the names of the inputs' dimensions.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import helper

from edgeprune.lint.graph import Dim, read_tensor

if TYPE_CHECKING:
    from edgeprune.lint.graph import Node, Scope

_LITERALS = ("value_int", "value_ints", "value_float", "value_floats")


@dataclass(frozen=True)
class Range:
    """Minimum and maximum length; `known` is false if a name had no range and any length is assumed."""

    low: float
    high: float
    known: bool = True


ANY_LENGTH = Range(0, math.inf, known=False)
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}
_CHOICES: dict[str, Callable[..., float]] = {"max": max, "min": min}


def range_of(dim: Dim, names: Mapping[str, Range]) -> Range:
    """Return the range of a dimension, given the ranges of names; ANY_LENGTH for an expression that cannot be parsed."""
    if isinstance(dim, int):
        return Range(dim, dim)
    if dim in names:
        return names[dim]
    try:
        return _evaluate(ast.parse(dim, mode="eval").body, names)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return ANY_LENGTH


def _evaluate(node: ast.expr, names: Mapping[str, Range]) -> Range:
    match node:
        case ast.Constant(value=int(value)):
            return Range(value, value)
        case ast.Name(id=name):
            return names.get(name, ANY_LENGTH)
        case ast.Call(func=ast.Name(id=name), args=arguments) if name.lower() in _CHOICES and arguments:
            return _min_or_max(_CHOICES[name.lower()], [_evaluate(argument, names) for argument in arguments])
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            a, b = _evaluate(left, names), _evaluate(right, names)
            return Range(a.low - b.high, a.high - b.low, a.known and b.known)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _combine(_ARITHMETIC[type(op)], _evaluate(left, names), _evaluate(right, names))
    return ANY_LENGTH


def _combine(function: Callable[[float, float], float], a: Range, b: Range) -> Range:
    # Lengths are not negative, but differences in an expression may be, so all four corners matter.
    corners = [function(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    if any(math.isnan(corner) for corner in corners):
        return ANY_LENGTH
    return Range(min(corners), max(corners), a.known and b.known)


def _min_or_max(function: Callable[..., float], ranges: list[Range]) -> Range:
    low, high = function(item.low for item in ranges), function(item.high for item in ranges)
    return Range(low, high, all(item.known for item in ranges))


def constant(scope: Scope, name: str) -> np.ndarray | None:
    """Return a value that depends only on constants and initializers; None otherwise.

    Folds Constant, Identity, Cast, Reshape, Squeeze, Unsqueeze and Concat, as TensorRT's parser does for weights.
    """
    if not name:
        return None
    if scope.is_stored(name):
        return scope.initializer(name)
    node = scope.producer(name)
    if node is None or not node.standard:
        return None
    if node.operator == "Constant":
        return _literal(node)
    fold = _FOLDS.get(node.operator)
    arguments = [constant(node.scope, item) for item in node.inputs] if fold else []
    if fold is None or any(item is None for item in arguments):
        return None
    try:
        return fold(node, [item for item in arguments if item is not None])
    except (TypeError, ValueError, IndexError):
        return None


def is_constant(scope: Scope, name: str) -> bool:
    """Return whether a value depends only on initializers and constants, whatever its size."""
    visited: set[str] = set()
    pending = [(scope, name)]
    while pending:
        current, item = pending.pop()
        if item in visited or current.is_stored(item):
            continue
        visited.add(item)
        node = current.producer(item)
        if node is None or any(True for _ in node.bodies()) or (not node.inputs and node.operator != "Constant"):
            return False
        if node.operator in ("Shape", "Size"):
            return False
        pending += [(node.scope, source) for source in node.inputs if source]
    return True


def _literal(node: Node) -> np.ndarray | None:
    tensor = node.attribute("value")
    if tensor is not None:
        return read_tensor(tensor, node.scope.folder)
    for name in _LITERALS:
        value = node.attribute(name)
        if value is not None:
            return np.asarray(value)
    return None


def _cast(node: Node, arguments: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(arguments[0].astype(helper.tensor_dtype_to_np_dtype(node.attribute("to"))))


def _squeeze(node: Node, arguments: Sequence[np.ndarray]) -> np.ndarray:
    axes = arguments[1].tolist() if len(arguments) > 1 else node.attribute("axes")
    return np.squeeze(arguments[0], tuple(axes) if axes is not None else None)


def _unsqueeze(node: Node, arguments: Sequence[np.ndarray]) -> np.ndarray:
    axes: Any = arguments[1].tolist() if len(arguments) > 1 else node.attribute("axes")
    return np.expand_dims(arguments[0], tuple(axes))


_FOLDS: dict[str, Callable[[Node, Sequence[np.ndarray]], np.ndarray]] = {
    "Identity": lambda node, arguments: arguments[0],
    "Cast": _cast,
    "Reshape": lambda node, arguments: arguments[0].reshape(arguments[1].tolist()),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": lambda node, arguments: np.concatenate(arguments, node.attribute("axis", 0)),
}
