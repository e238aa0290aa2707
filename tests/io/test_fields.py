"""Dataclasses made of JSON: every field as it was declared, or an error that names the first that is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import EdgePruneError, one_line
from edgeprune.io.typed_json import from_json, is_text, read_json


@dataclass(frozen=True)
class Inner:
    size: int | str


@dataclass(frozen=True)
class Outer:
    name: str
    share: float
    inner: Inner
    several: tuple[Inner, ...] = ()
    named: Mapping[str, int] = field(default_factory=dict)
    maybe: Inner | None = None
    free: Mapping[str, Any] = field(default_factory=dict)
    sure: bool = False


PLAIN: dict[str, Any] = {"name": "a", "share": 1, "inner": {"size": 3}}


def test_what_is_declared_is_made() -> None:
    more = {"several": [{"size": "n"}], "named": {"b": 2}, "maybe": {"size": 1}, "free": {"c": [None, {"d": 0.5}]}, "sure": True}
    found = from_json(Outer, PLAIN | more)
    assert found == Outer("a", 1, Inner(3), (Inner("n"),), {"b": 2}, Inner(1), {"c": [None, {"d": 0.5}]}, True)
    assert from_json(Outer, PLAIN | {"maybe": None}) == Outer("a", 1, Inner(3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": 3}, "it.name must be a text, not 3"),
        ({"name": "\ud800"}, "it.name must be a text"),
        ({"share": "1"}, "it.share must be a number"),
        ({"share": float("nan")}, "it.share must be a number"),
        ({"share": True}, "it.share must be a number"),
        ({"inner": []}, "it.inner must be names and values"),
        ({"inner": {}}, "it.inner lacks 'size'"),
        ({"inner": {"size": 1, "colour": 2}}, "it.inner has the unknown field 'colour'"),
        (
            {"inner": {"size": 2**63}},
            "it.inner.size must be a text or a whole number|it.inner.size must be a whole number or a text",
        ),
        ({"several": {"size": 1}}, "it.several must be a list"),
        ({"several": [{"size": 1}, {"size": None}]}, r"it.several\[1\].size"),
        ({"named": {"b": 2.0}}, "it.named must be a whole number"),
        ({"maybe": 1}, "it.maybe must be names and values"),
        ({"sure": 1}, "it.sure must be true or false"),
        ({"free": {"a": float("inf")}}, "it.free must be a number"),
        ({"free": {"\ud800": 1}}, "a name in it.free"),
        ({"name": "x" * 9000, "share": "y" * 9000}, "it.share must be a number, not 'yyy"),
    ],
)
def test_what_is_not_declared_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        from_json(Outer, PLAIN | change)
    assert len(str(caught.value)) < 200


def test_what_has_no_declared_form_is_not_deep() -> None:
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        from_json(Outer, PLAIN | {"free": {"a": deep}})


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "1" * 5000, "\ufeff{}"])
def test_what_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")


def test_texts_can_be_written() -> None:
    assert is_text("é😀") and not is_text("\udfff") and not is_text(b"a")


def test_messages_are_one_readable_line() -> None:
    assert one_line("a\nb\tc\x1b[31m\u202e\ud800é") == "a b c\\x1b[31m\\u202e\\ud800é"
    long = EdgePruneError("begin " + "x" * 5000 + " end", hint="Do this.")
    assert str(long).startswith("begin xxx") and str(long).endswith("xxx end Do this.") and len(str(long)) < 1000
