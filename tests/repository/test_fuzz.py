"""Fuzzing, the part that every run of the tests has: ten thousand cases, the same each time, and what was found before."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from repository import TESTS

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from fuzz import nightly, target
from fuzz.by_properties import hunt, run
from fuzz.findings import Findings
from fuzz.state import State
from fuzz.target import Broken, Hang, Target, attempt, check_message
from fuzz.targets import TARGETS

from edgeprune.runtime.media import images

PLAN = '{"schema_version":2,"family":"x","layers":%s,"geometry":{"height":%s,"width":28,"patch":14,"merge":%s},"cuts":%s}'
CUT = '[{"site":"input","method":"random","keep":1,%s}]'
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(autouse=True)
def settings_of_the_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back what targets change for a process that is theirs alone."""
    monkeypatch.setattr(images, "MAX_PIXELS", images.MAX_PIXELS)
    log, interval = logging.getLogger("edgeprune.server"), sys.getswitchinterval()
    before = log.level
    yield
    log.setLevel(before)
    sys.setswitchinterval(interval)


def made(name: str) -> Target:
    entry = TARGETS[name]
    if entry.missing:
        pytest.skip(f"{', '.join(entry.missing)} is not installed")
    return entry.make()


def test_there_are_ten_thousand_cases() -> None:
    assert sum(entry.ci for entry in TARGETS.values()) >= 10_000


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_breaks_anything(name: str) -> None:
    fuzzed, cases = made(name), 0

    def check(data: bytes) -> None:
        nonlocal cases
        cases += 1
        attempt(fuzzed, data)

    run(fuzzed, check, TARGETS[name].ci, derandomize=True)
    assert cases >= TARGETS[name].ci


@pytest.mark.parametrize("name", TARGETS)
def test_valid_inputs_are_taken(name: str) -> None:
    fuzzed = made(name)
    assert sum(attempt(fuzzed, seed) for seed in fuzzed.seeds) > len(fuzzed.seeds) // 2 or name == "frames"


def statistics(header: str) -> bytes:
    """Return a file of statistics whose own part of the header is this text."""
    data = json.dumps({"__metadata__": {"edgeprune": header}}).encode()
    return len(data).to_bytes(8, "little") + data


def nested(depth: int = 5000) -> str:
    return "[" * depth + "]" * depth


# What once escaped as another error, hung, or was taken though it is no such thing.
FOUND: dict[str, tuple[str, str | bytes]] = {
    "a plan that is nested too deeply": ("plans", nested()),
    "a number of more digits than Python reads": ("plans", "1" * 5000),
    "an endless number of layers": ("plans", PLAN % ("1e999", 28, 1, "[]")),
    "more layers than can be counted": ("plans", PLAN % (10**15, 28, 1, CUT.replace("input", "decode") % '"layer":1')),
    "a patch without pixels": ("plans", PLAN % (2, 28, 0, "[]")),
    "a picture without a size": ("plans", PLAN % (2, 0, 1, "[]")),
    "a picture of half pixels": ("plans", PLAN % (2, 28.5, 1, "[]")),
    "a geometry that is a text": ("plans", '{"schema_version":2,"family":"x","layers":2,"geometry":"28x28","cuts":[]}'),
    "a seed that is a list": ("plans", PLAN % (2, 28, 1, CUT % '"seed":[]')),
    "options that are nested too deeply": ("plans", PLAN % (2, 28, 1, CUT % f'"options":{{"a":{nested(200)}}}')),
    "a plan without its list of cuts": ("plans", PLAN.replace(',"cuts":%s', "") % (2, 28, 1)),
    "half a character in a plan": ("plans", (PLAN % (2, 28, 1, "[]")).replace('"x"', '"\\ud800"')),
    "a very long schema version": ("plans", '{"schema_version":"' + "x" * 5000 + '"}'),
    "a patch without pixels in a tier": ("tiers", '{"a":' + PLAN % (2, 28, 0, "[]") + "}"),
    "a tier of a very long name": ("tiers", '{"' + "x" * 5000 + '":' + PLAN % (2, 28, 1, "[]") + "}"),
    "a header of statistics that is a list": ("statistics", statistics("[]")),
    "statistics that are nested too deeply": ("statistics", statistics(nested())),
    "statistics of a geometry of lists": (
        "statistics",
        statistics('{"schema_version":1,"samples":1,"source":{"geometry":{"height":[],"width":1,"patch":1,"merge":1}}}'),
    ),
    "times that are nested too deeply": ("times", nested()),
    "a time that is nothing": ("times", '{"schema_version":1,"device":"a","how":"b","tokens":1,"vision_ms":null,"prefill_ms":[1]}'),
    "no time at all": ("times", '{"schema_version":1,"device":"a","how":"b","tokens":1,"vision_ms":1,"prefill_ms":[]}'),
    "a sample that is nested too deeply": ("samples", nested()),
    "an image of a very long name": ("samples", json.dumps({"image": "a/" * 3000, "prompt": "p", "answer": "a"})),
    "half a character in a prompt": ("samples", '{"image":"a.png","prompt":"\\ud800","answer":"a"}'),
    "a date that is none": ("settings", "special: !!timestamp no"),
    "choices that are a number": ("schemas", '{"choices":249}'),
    "a type that turns the line around": ("schemas", '{"json_schema":{"type":"ar\u202eray"}}'),
    "a parameter that breaks the line": ("chat_bodies", '{"messages":[{"role":"user","content":"a"}],"\\n":1}'),
    "a parameter of a very long name": ("chat_bodies", '{"messages":[{"role":"user","content":"a"}],"' + "x" * 5000 + '":1}'),
    "a model of a very long name": (
        "http",
        HEAD
        + "Content-Length: 5060\r\n\r\n"
        + '{"model":"'
        + "x" * 5000
        + '","messages":[{"role":"user","content":"a"}]}'.ljust(50),
    ),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_is_refused(what: str) -> None:
    name, data = FOUND[what]
    assert not attempt(made(name), data.encode() if isinstance(data, str) else data)


def test_a_temperature_without_an_end_is_none() -> None:
    assert not attempt(made("tegrastats"), b"x@" + b"9" * 400 + b"C")


def test_samples_may_hold_other_ends_of_lines() -> None:
    line = json.dumps({"image": "a.png", "prompt": "one\u2028two\x85three", "answer": "a"}, ensure_ascii=False)
    assert attempt(made("samples"), line.encode())


def endless(data: bytes) -> bool:
    while data:
        time.sleep(0.001)
    return True


def divides(data: bytes) -> bool:
    return bool(1 // (data.count(b"x") - 3))


def flipped(data: bytes, random: Random) -> bytes:
    return data + b"x" * random.randrange(9)


def test_a_hang_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "LIMIT_S", 0.05)
    with pytest.raises(Hang):
        attempt(Target(endless, (b"",), flipped), b"x")


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Target(lambda data: bool(bytearray(b"x") * (1 << 26)), (b"",), flipped)
    monkeypatch.setattr(target, "_peak_mib", iter((100, 900)).__next__)
    with pytest.raises(Broken, match="800 MiB"):
        attempt(held, b"x")


@pytest.mark.parametrize("message", ["", "a\nb", "a\x1b[31mb", "\u202eabc", "\ud800", "a" * 3000])
def test_bad_messages_are_seen(message: str) -> None:
    with pytest.raises(Broken):
        check_message(message)


def test_what_breaks_is_kept_once_and_small(tmp_path: Path) -> None:
    state = State(tmp_path / "state")
    broken = Target(divides, (b"aaaa",), flipped)
    hunt(broken, Findings("divides", broken, tmp_path / "found", state), lambda: state.counts[0], 1100, 0)
    assert state.counts[0] >= 1100
    [case] = (tmp_path / "found").glob("*.case")
    assert case.read_bytes().count(b"x") == 3
    assert "ZeroDivisionError" in case.with_suffix(".txt").read_text()


@pytest.mark.parametrize(
    ("code", "why"), [("import os; os.abort()", "ended with -6"), ("import time; time.sleep(60)", "No end after")]
)
def test_processes_that_die_or_hang_are_seen(code: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nightly, "_STALLED_S", 0.5)
    state = State(tmp_path / "state")
    state.begin(b"the case")
    assert why in nightly.watched([sys.executable, "-c", code], tmp_path / "log", State(tmp_path / "state"))
    assert State(tmp_path / "state").case == b"the case"


@pytest.mark.slow
def test_a_small_nightly_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folders = (TESTS, TESTS / "support" / "servers", TESTS / "support" / "devices")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    rows = nightly.nightly(400, tmp_path, ["tegrastats"])
    table = nightly.report(rows, tmp_path)
    total = json.loads((tmp_path / "report.json").read_text())["total"]
    assert total["cases"] >= 400 and total["findings"] == 0 and f"{total['cases']} cases in" in table
    assert ("atheris is not installed" in capsys.readouterr().out) == ([row.engine for row in rows] == ["hypothesis"])
