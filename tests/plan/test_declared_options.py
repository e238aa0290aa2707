"""Options of methods: one declaration is listed, parsed and checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from learned_weights import input_cut

from edgeprune.errors import PlanError, UsageError
from edgeprune.plan import Cut, Geometry, Option
from edgeprune.plan.options import parse_options
from edgeprune.plan.presets import staircase_plan, unpruned_plan
from edgeprune.registry import METHODS, method_class, options_of

CORE = Option("core", 0.5, "share", least=0.0, most=1.0)
KINDS = (
    CORE,
    Option("block", 1, "tokens", least=1),
    Option("spread", False, "lattice"),
    Option("rows", "last", "", ("last", "peak")),
)
LIST = Option("eta", None, "limits", kind="list", unset="measured")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_declarations_are_read_without_importing_a_method(name: str) -> None:
    kind = method_class(name)
    ranking, budgets = (tuple(getattr(kind, attribute, ())) for attribute in ("options", "calibration_options"))
    assert options_of(name) == ranking
    assert options_of(name, calibration=True) == (*ranking, *budgets)
    assert len({option.name for option in (*ranking, *budgets)}) == len(ranking) + len(budgets)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_declaration_is_whole(name: str) -> None:
    for option in options_of(name, calibration=True):
        assert option.meaning and not option.meaning.endswith(".")
        assert option.default is not None or (option.kind and option.unset)
        for value in (*option.tries, *option.choices, *(() if option.default is None else (option.default,))):
            option.check(value)


@pytest.mark.parametrize("name", sorted(name for name in METHODS if options_of(name)))
def test_a_cut_knows_the_options_that_its_method_declares(name: str) -> None:
    site = method_class(name).sites[0]
    for option in options_of(name):
        cut = input_cut(name, 4, 12, **{option.name: option.default})
        method_class(name)(replace(cut, site=site), Geometry(64, 64, 16, 1))
    with pytest.raises(PlanError, match="unknown option 'colour'"):
        method_class(name)(Cut(site, name, 4, options={"colour": 1}), Geometry(64, 64, 16, 1))


def test_texts_become_values() -> None:
    texts = ("core=1", "block=3", "spread=yes", "rows=peak")
    values = parse_options("m", texts, KINDS)
    assert values == {"core": 1.0, "block": 3, "spread": True, "rows": "peak"} and isinstance(values["core"], float)
    assert parse_options("m", ["spread=false", "rows=last"], KINDS) == {"spread": False, "rows": "last"}
    assert parse_options("m", ["eta=[1, 2]"], (LIST,)) == {"eta": [1, 2]}


def test_a_method_without_declarations_gets_what_json_reads() -> None:
    assert parse_options("a.b:C", ["x=0.5", "y=true", "z=near", "w=a=b"], None) == {"x": 0.5, "y": True, "z": "near", "w": "a=b"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("core", "Write NAME=VALUE"),
        ("=3", "Write NAME=VALUE"),
        ("cor=3", "Did you mean core"),
        ("core=1.1", "number from 0 to 1"),
        ("core=NaN", "of type float"),
        ("core=yes", "of type float"),
        ("block=0", "whole number, 1 or more"),
        ("block=1.5", "of type int"),
        ("block=true", "of type int"),
        ("spread=1", "yes or no"),
        ("rows=pak", "Did you mean peak"),
        ("rows=", "one of last, peak"),
    ],
)
def test_what_is_not_allowed_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_options("m", [text], KINDS)


def test_a_name_is_given_once() -> None:
    with pytest.raises(UsageError, match="twice"):
        parse_options("m", ["core=0.1", "core=0.2"], KINDS)


@pytest.mark.parametrize(("option", "shown"), [(KINDS[2], "no"), (CORE, "0.5"), (LIST, "measured")])
def test_defaults_are_shown_as_one_writes_them(option: Option, shown: str) -> None:
    assert option.shown_default == shown


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        ({}, "number"),
        ({"least": 0}, "number, 0 or more"),
        ({"most": 1}, "number, 1 or less"),
        ({"least": 0, "most": 1}, "from 0 to 1"),
    ],
)
def test_limits_are_said(limits: dict[str, Any], allowed: str) -> None:
    assert Option("x", 0.5, "", **limits).allowed.endswith(allowed)


def test_a_staircase_gives_its_options_to_every_cut() -> None:
    base = unpruned_plan("qwen2_vl", 4, Geometry(64, 64, 16, 1))
    plan = staircase_plan(base, "own.module:Method", [0.5, 0.25], [1, 2], options={"x": 2})
    assert [cut.options for cut in plan.cuts] == [{"x": 2}, {"x": 2}]
