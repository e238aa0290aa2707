"""Options of pruning methods: each is declared once, for checks, listings, documentation and searches. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.errors import PlanError, UsageError, did_you_mean

_KINDS = {"bool": "yes or no", "int": "whole number", "float": "number", "str": "text", "list": "list"}
_BOOLS = {"yes": True, "true": True, "no": False, "false": False}


@dataclass(frozen=True)
class Option:
    """A setting of a method.

    `default`: its type is the option's, one of _KINDS; None if the value follows from something else, which `unset` says, and then
    `kind` names the type. `meaning`: a clause for listings. `choices`: the values of a text. `least`, `most`: the bounds of a
    number, both allowed. `published`: the default is stated in the paper or the authors' code; otherwise it is ours. `tries`: the
    values that `edgeprune calibrate` compares unless one is given.

    Methods declare options by constants alone, since listings parse their files (`edgeprune.registry.options_of`).
    """

    name: str
    default: Any
    meaning: str
    choices: tuple[str, ...] = ()
    least: float = -math.inf
    most: float = math.inf
    published: bool = False
    tries: tuple[Any, ...] = ()
    kind: str = ""
    unset: str = ""

    @property
    def type(self) -> str:
        """The name of the type of values."""
        return self.kind or type(self.default).__name__

    @property
    def shown_default(self) -> str:
        """The default as one writes it."""
        if self.default is None:
            return self.unset
        return {True: "yes", False: "no"}[self.default] if self.type == "bool" else str(self.default)

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        bounds = (self.least > -math.inf, self.most < math.inf)
        return (
            _KINDS[self.type]
            + {
                (True, True): f" from {self.least:g} to {self.most:g}",
                (True, False): f", {self.least:g} or more",
                (False, True): f", {self.most:g} or less",
                (False, False): "",
            }[bounds]
        )

    def check(self, value: Any) -> None:
        """Raise PlanError for a value of another type or out of range."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        fits = {
            "bool": isinstance(value, bool),
            "int": number and isinstance(value, int),
            "float": number,
            "str": isinstance(value, str),
            "list": isinstance(value, list),
        }[self.type]
        if not fits:
            raise PlanError(f"Option {self.name!r} must be of type {self.type}, not {value!r}.", hint=f"Allowed: {self.allowed}.")
        if (self.choices and value not in self.choices) or (number and not self.least <= value <= self.most):
            close = did_you_mean(value, self.choices) if self.choices else ""
            raise PlanError(f"Option {self.name!r} cannot be {value!r}.", hint=f"{close}Allowed: {self.allowed}.")

    def parse(self, text: str) -> Any:
        """Return the value that a text stands for; raise UsageError for none that is allowed."""
        value: Any = text
        if self.type == "bool":
            value = _BOOLS.get(text.lower(), text)
        elif self.type != "str":
            value = _number_or_list(text)
        self.check(value)
        return float(value) if self.type == "float" else value


def parse_options(method: str, texts: Iterable[str], declared: Sequence[Option] | None) -> dict[str, Any]:
    """Return the values by name of texts "NAME=VALUE" for a method with these options.

    None: a method of the user's own that declares none; values are then read as JSON where they are JSON. Raises UsageError for a
    text of another form, an unknown or repeated name, or a value that is not allowed.
    """
    known = None if declared is None else {option.name: option for option in declared}
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"{text!r} is no option of a method.", hint="Write NAME=VALUE, such as core=0.3.")
        if name in values:
            raise UsageError(f"Option {name!r} of {method} is given twice.", hint="Give it once.")
        if known is not None and name not in known:
            raise unknown_option(method, name, known)
        values[name] = _number_or_list(value) if known is None else known[name].parse(value)
    return values


def unknown_option(method: str, name: str, known: Iterable[str]) -> PlanError:
    """Return the error for an option that a method does not have."""
    names = list(known)
    listed = f"Options of {method}: {', '.join(names)}." if names else f"{method} has no options."
    return PlanError(f"{method} has the unknown option {name!r}.", hint=f"{did_you_mean(name, names)}{listed}")


def settled(method: str, given: Mapping[str, Any], declared: Sequence[Option]) -> dict[str, Any]:
    """Return the value of every declared option, as given or by default; raise PlanError for what is not allowed."""
    known = {option.name: option for option in declared}
    for name, value in given.items():
        if name not in known:
            raise unknown_option(method, name, known)
        try:
            known[name].check(value)
        except PlanError as error:
            raise PlanError(f"{method}: {error.message}", hint=error.hint) from error
    return {option.name: option.default for option in declared} | dict(given)


def _number_or_list(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
