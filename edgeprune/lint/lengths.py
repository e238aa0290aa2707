"""How long dynamic dimensions may be: ranges of names from a profile, and of expressions such as `text + 2*image - 1`.

The exporter of torch writes the length of a computed dimension as an expression over the names of the inputs' dimensions.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Dim = int | str  # a length, a name or an expression; an empty string where nothing is known


@dataclass(frozen=True)
class Range:
    """The least and the greatest length; `known` is false where a name had no range and any length is assumed."""

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
    """Return the range of a dimension, given those of names; any length for an expression that cannot be read."""
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
            return _choose(_CHOICES[name.lower()], [_evaluate(argument, names) for argument in arguments])
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            a, b = _evaluate(left, names), _evaluate(right, names)
            return Range(a.low - b.high, a.high - b.low, a.known and b.known)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _combine(_ARITHMETIC[type(op)], _evaluate(left, names), _evaluate(right, names))
    return ANY_LENGTH


def _combine(function: Callable[[float, float], float], a: Range, b: Range) -> Range:
    # Lengths are not negative, yet differences inside an expression may be: all four corners count.
    corners = [function(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    if any(math.isnan(corner) for corner in corners):
        return ANY_LENGTH
    return Range(min(corners), max(corners), a.known and b.known)


def _choose(function: Callable[..., float], ranges: list[Range]) -> Range:
    low, high = function(item.low for item in ranges), function(item.high for item in ranges)
    return Range(low, high, all(item.known for item in ranges))
