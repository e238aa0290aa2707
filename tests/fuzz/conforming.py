"""Whether a value is of the type that its class declares, all the way down."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from edgeprune.calibration.data.samples import StoredImage
from fuzz.target import Broken


def check_type(value: Any, hint: Any, where: str = "the value") -> None:
    """Raise Broken unless `value` is a `hint`: a plain type, a dataclass, or a tuple, mapping or union of them.

    Numbers are finite, whole ones no bools, and texts are such that UTF-8 can write them.
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        _check_any(value, get_args(hint), where)
    elif origin is tuple:
        _check_tuple(value, get_args(hint), where)
    elif origin is not None and issubclass(origin, Mapping):
        _check_mapping(value, get_args(hint), where)
    elif is_dataclass(hint):
        _demand(isinstance(value, hint), value, where)  # type: ignore[arg-type]
        kind: Any = type(value)
        for name, inner in _hints(kind).items():
            check_type(getattr(value, name), inner, f"{where}.{name}")
    else:
        _demand(_PLAIN[hint](value), value, where)


def _check_any(value: Any, hints: tuple[Any, ...], where: str) -> None:
    for hint in hints:
        try:
            return check_type(value, hint, where)
        except Broken:
            continue
    raise Broken(f"{where} is {value!r:.80}.")


def _check_tuple(value: Any, hints: tuple[Any, ...], where: str) -> None:
    _demand(isinstance(value, tuple), value, where)
    for number, each in enumerate(value):
        check_type(each, hints[0], f"{where}[{number}]")


def _check_mapping(value: Any, hints: tuple[Any, ...], where: str) -> None:
    _demand(isinstance(value, Mapping), value, where)
    for name, each in value.items():
        check_type(name, hints[0], f"a name in {where}")
        check_type(each, hints[1], f"{where}[{name!r:.40}]")


def is_text(value: object) -> bool:
    """Tell whether a value is a text that UTF-8 can write."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_whole(value: object) -> bool:
    """Tell whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Tell whether a value is a finite number."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


_PLAIN: dict[Any, Callable[[object], bool]] = {
    str: is_text,
    int: is_whole,
    float: is_number,
    bool: lambda value: isinstance(value, bool),
    Path: lambda value: isinstance(value, Path),
    StoredImage: lambda value: isinstance(value, StoredImage),
    type(None): lambda value: value is None,
    Any: lambda value: True,
}


def _demand(condition: bool, value: Any, where: str) -> None:
    if not condition:
        raise Broken(f"{where} is {value!r:.80}.")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}
