"""The keywords of an answer: one list for the type checker and the two dataclasses that hold them."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import pytest
from repository import ROOT

from edgeprune.errors import UsageError
from edgeprune.runtime.api.options import AnswerOptions, parse_options
from edgeprune.runtime.generation.request import RequestLimits
from edgeprune.runtime.generation.sampling import Sampling

SNIPPET = """from edgeprune.runtime import Feed, Runtime

def ask(model: Runtime, feed: Feed) -> None:
    model.generate("a.png", "What?", max_tokens=3, seed=None, tier="fast", prune=False)
    model.generate("a.png", "What?", max_tokns=3)
    model.stream("a.png", "What?", temprature=1.0)
    model.ask_latest(feed, "What?", timeout=1.0, deadline=5)
    model.chat().ask("What?", max_tokens="3")
"""


def test_the_keywords_are_the_fields_of_both_dataclasses() -> None:
    declared = {field.name: field.type for kind in (RequestLimits, Sampling) for field in fields(kind)}
    assert {name: reference.__forward_arg__ for name, reference in AnswerOptions.__annotations__.items()} == declared


def test_each_keyword_reaches_its_dataclass() -> None:
    sampling, limits = parse_options({"max_tokens": 3, "stop": ["x"], "tier": "fast", "deadline_ms": 5})
    assert (sampling, limits) == (Sampling(max_tokens=3, stop=["x"]), RequestLimits(tier="fast", deadline_ms=5))
    with pytest.raises(UsageError, match=r"no option 'max_tokns'.*max_tokens.*deadline_ms"):
        parse_options({"max_tokns": 3})  # type: ignore[typeddict-unknown-key]


@pytest.mark.slow
def test_a_type_checker_refuses_a_misspelt_keyword(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mypy import api

    (tmp_path / "ask.py").write_text(SNIPPET)
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    cache = tmp_path / "cache"
    options = ["--strict", "--follow-imports=silent", "--disable-error-code=type-arg", f"--cache-dir={cache}"]
    report, _, _ = api.run([*options, "--python-executable", sys.executable, str(tmp_path / "ask.py")])
    assert [line.split(":")[1] for line in report.splitlines() if "error:" in line and "ask.py" in line] == [
        "5",
        "6",
        "7",
        "8",
    ]
