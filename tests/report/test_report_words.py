"""A plan in words."""

from __future__ import annotations

from dataclasses import replace

from test_report import LIVE, PLAN

from edgeprune.plan import Cut
from edgeprune.report.text import costs, describe_cuts, format_counts, schedule_of, spans


def test_cuts_in_words() -> None:
    lines = describe_cuts(PLAN)
    assert [line.name for line in lines] == ["random @ input", "fastv @ layer 1", "plphp @ cache 0 to 2", "dyrate @ decode 0"]
    assert lines[0].text == "10 of 12 visual tokens (83%) enter the decoder." and "(seed = 4)" in lines[0].source
    assert "3 to 8 visual tokens" in lines[2].text
    assert lines[3].text.endswith("100% from step 0, 50% from step 2.")
    assert "one of 2 shares from 0% to 100%" in describe_cuts(LIVE)[-1].text
    assert spans("layers", [0, 1, 2, 5, 7, 8]) == "layers 0 to 2, 5, 7 to 8"
    assert (format_counts([4, 4]), format_counts([4, 3, 9])) == ("4", "3 to 9")
    assert [share for _, share, _ in costs(PLAN)] == [f"{22 / 36:.0%}", f"{16 / 36:.0%}"]


def test_a_schedule_never_grows_unless_it_may() -> None:
    cut = Cut("decode", "dyrate", 0, options={"form": "schedule", "steps": [1, 2, 3], "shares": [0.5, 0.8, 0.2]})
    assert schedule_of(cut, 4)[:4] == [1.0, 0.5, 0.5, 0.2]
    assert schedule_of(replace(cut, options={**cut.options, "monotone": False}), 4)[:4] == [1.0, 0.5, 0.8, 0.2]
    assert len(schedule_of(cut, 50)) == 50
