"""Dataclasses made of JSON that anybody may have written: every field is of the type that it was declared with."""

from __future__ import annotations

import json
import math
import reprlib
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def is_text(value: object) -> bool:
    """Tell whether a value is a text that can be written: JSON can name halves of characters, which no file takes."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


_LARGEST = 2**63 - 1  # sizes and ids become 64-bit numbers
_DEEPEST = 16  # of what a field may hold without a declared form
_PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("a text", is_text),
    int: ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST),
    float: ("a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and _finite(value)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    type(None): ("nothing", lambda value: value is None),
}


def read_json(path: Path) -> Any:
    """Return the value in a JSON file. Raises OSError, and ValueError for what is no JSON or goes beyond bounds."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def from_json(kind: type[T], data: Any, name: str = "it") -> T:
    """Return the dataclass `kind` of a JSON object; raise ValueError naming the first field that is not as declared.

    Its dataclasses, tuples and mappings are made of what JSON has for them. Numbers are finite and fit 64 bits.
    """
    result: T = _of(kind, data, name)
    return result


def _of(hint: Any, value: Any, name: str) -> Any:
    origin = get_origin(hint)
    if is_dataclass(hint):
        return _object(hint, _members(value, name), name)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} must be a list, not {reprlib.repr(value)}")
        return tuple(_of(get_args(hint)[0], each, f"{name}[{number}]") for number, each in enumerate(value))
    if origin in (Union, types.UnionType):
        return _either(get_args(hint), value, name)
    if origin is not None:
        return {
            _of(str, key, f"a name in {name}"): _of(get_args(hint)[1], each, name) for key, each in _members(value, name).items()
        }
    if hint is Any:
        _check_any(value, name, _DEEPEST)
    elif not _PLAIN[hint][1](value):
        raise ValueError(f"{name} must be {_PLAIN[hint][0]}, not {reprlib.repr(value)}")
    return value


def _either(hints: tuple[Any, ...], value: Any, name: str) -> Any:
    # One of some plain types, or the one that is not plain.
    plain = [hint for hint in hints if hint in _PLAIN]
    if any(_PLAIN[hint][1](value) for hint in plain):
        return value
    others = [hint for hint in hints if hint not in _PLAIN]
    if not others:
        raise ValueError(f"{name} must be {' or '.join(_PLAIN[hint][0] for hint in plain)}, not {reprlib.repr(value)}")
    return _of(others[0], value, name)


def _object(kind: Any, data: Mapping[str, Any], name: str) -> Any:
    known = _declared(kind)
    unknown = next((each for each in data if each not in known), None)
    if unknown is not None:
        raise ValueError(f"{name} has the unknown field {reprlib.repr(unknown)}")
    missing = next((each for each, (_, needed) in known.items() if needed and each not in data), None)
    if missing is not None:
        raise ValueError(f"{name} lacks {missing!r}")
    return kind(**{each: _of(known[each][0], value, f"{name}.{each}") for each, value in data.items()})


def _members(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be names and values, not {reprlib.repr(value)}")
    return value


def _check_any(value: Any, name: str, depth: int) -> None:
    if depth == 0:
        raise ValueError(f"{name} is nested too deeply")
    if isinstance(value, Mapping):
        for key in value:
            _of(str, key, f"a name in {name}")
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else None
    if inner is None:
        _of(type(value) if type(value) in _PLAIN else str, value, name)
        return
    for each in inner:
        _check_any(each, name, depth - 1)


def _finite(value: float) -> bool:
    return abs(value) <= _LARGEST if isinstance(value, int) else math.isfinite(value)


@cache
def _declared(kind: Any) -> dict[str, tuple[Any, bool]]:
    # By field: its type, and whether it must be given.
    hints = get_type_hints(kind)
    return {each.name: (hints[each.name], each.default is MISSING and each.default_factory is MISSING) for each in fields(kind)}
