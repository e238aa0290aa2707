"""Build dataclasses from untrusted JSON, checking every field against its declared type."""

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
    """Return whether a value is a string that UTF-8 can encode. JSON can contain lone surrogates, which it cannot."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


_MAX_INT = 2**63 - 1  # sizes and ids become 64-bit integers
_MAX_DEPTH = 16  # nesting of fields of type Any
_PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("a text", is_text),
    int: ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX_INT),
    float: ("a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    type(None): ("nothing", lambda value: value is None),
}


def read_json(path: Path) -> Any:
    """Return the value in a JSON file. Raises OSError, and ValueError for invalid or too deeply nested JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def fault(error: Exception) -> str:
    """Return in a few words why a JSON file could not be used, from the exception of reading it or of its missing fields."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UnicodeDecodeError):  # its own text holds the whole file
        return "it is not text"
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]!r}"
    return "its parts are of other types" if isinstance(error, (TypeError, AttributeError)) else str(error)


def from_json(kind: type[T], data: Any, name: str = "it") -> T:
    """Build the dataclass `kind` from a JSON object; raise ValueError naming the first field that does not match its type.

    Nested dataclasses, tuples and mappings are converted too. Numbers must be finite and fit in 64 bits.
    """
    result: T = _convert(kind, data, name)
    return result


def _convert(hint: Any, value: Any, name: str) -> Any:
    origin = get_origin(hint)
    if is_dataclass(hint):
        return _convert_object(hint, _members(value, name), name)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} must be a list, not {reprlib.repr(value)}")
        return tuple(_convert(get_args(hint)[0], item, f"{name}[{number}]") for number, item in enumerate(value))
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(hint), value, name)
    if origin is not None:
        return {
            _convert(str, key, f"a name in {name}"): _convert(get_args(hint)[1], item, name)
            for key, item in _members(value, name).items()
        }
    if hint is Any:
        _check_any(value, name, _MAX_DEPTH)
    elif not _PLAIN[hint][1](value):
        raise ValueError(f"{name} must be {_PLAIN[hint][0]}, not {reprlib.repr(value)}")
    return value


def _convert_union(hints: tuple[Any, ...], value: Any, name: str) -> Any:
    # A union of plain types and at most one other type.
    plain = [hint for hint in hints if hint in _PLAIN]
    if any(_PLAIN[hint][1](value) for hint in plain):
        return value
    others = [hint for hint in hints if hint not in _PLAIN]
    if not others:
        raise ValueError(f"{name} must be {' or '.join(_PLAIN[hint][0] for hint in plain)}, not {reprlib.repr(value)}")
    return _convert(others[0], value, name)


def _convert_object(kind: Any, data: Mapping[str, Any], name: str) -> Any:
    known = _declared_fields(kind)
    unknown = next((field for field in data if field not in known), None)
    if unknown is not None:
        raise ValueError(f"{name} has the unknown field {reprlib.repr(unknown)}")
    missing = next((field for field, (_, needed) in known.items() if needed and field not in data), None)
    if missing is not None:
        raise ValueError(f"{name} lacks {missing!r}")
    return kind(**{field: _convert(known[field][0], value, f"{name}.{field}") for field, value in data.items()})


def _members(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be names and values, not {reprlib.repr(value)}")
    return value


def _check_any(value: Any, name: str, depth: int) -> None:
    if depth == 0:
        raise ValueError(f"{name} is nested too deeply")
    if isinstance(value, Mapping):
        for key in value:
            _convert(str, key, f"a name in {name}")
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else None
    if inner is None:
        _convert(type(value) if type(value) in _PLAIN else str, value, name)
        return
    for item in inner:
        _check_any(item, name, depth - 1)


def _is_finite(value: float) -> bool:
    return abs(value) <= _MAX_INT if isinstance(value, int) else math.isfinite(value)


@cache
def _declared_fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    # Type of each field and whether it is required.
    hints = get_type_hints(kind)
    return {
        field.name: (hints[field.name], field.default is MISSING and field.default_factory is MISSING) for field in fields(kind)
    }
