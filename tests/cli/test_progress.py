"""How far a long command is: words, times left, and lines where there is no terminal."""

from __future__ import annotations

import io
import time

import pytest
from click.testing import CliRunner
from rich.console import Console

from edgeprune.cli.output import progress as shown
from edgeprune.cli.output.progress import CommandProgress, EngineProgress


class Clock:
    """A clock that a test turns."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_count_has_its_total_and_the_time_left(clock: Clock) -> None:
    progress = CommandProgress(clock=clock)
    assert progress.words() == ""
    counted = progress.count("samples", 48)
    assert progress.words() == "samples: 0/48, 0:00"
    clock.now += 63
    counted(12)
    assert progress.words() == "samples: 12/48, 1:03"  # 12 may be of an earlier run
    counted(14)
    clock.now += 63
    counted(24)
    assert progress.words() == "samples: 24/48, 2:06, about 4:12 left"
    clock.now += 3600
    progress.say("writing")
    clock.now += 3725
    assert progress.words() == "writing: 1:02:05"


def test_the_pace_is_that_of_this_run(clock: Clock) -> None:
    progress = CommandProgress(clock=clock)
    counted = progress.count("samples", 48)
    counted(40)  # of an earlier run
    assert "left" not in progress.words()
    clock.now += 20
    counted(42)
    assert progress.words() == "samples: 42/48, 0:20, about 1:00 left"


def test_stages_are_numbered_and_print_their_time(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = CommandProgress(["model", "decoder"], clock=clock)
    progress.begin("model")
    clock.now += 2.5
    progress.begin("decoder")
    progress.count("writing MB of weights", 4000)(1000)
    clock.now += 10
    assert progress.words().startswith("[2/2] decoder, writing MB of weights: 1000/4000, 0:10")
    assert capsys.readouterr().err == "model               2.5 s\n"


def test_without_a_terminal_a_line_comes_after_five_seconds_and_every_ten(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = CommandProgress(clock=clock)
    counted = progress.count("samples", 100)
    counted(0)
    for second in range(1, 31):
        clock.now += 1
        counted(second)
        progress.print_if_due()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "samples: 5/100, 0:05, about 1:35 left",
        "samples: 15/100, 0:15, about 1:25 left",
        "samples: 25/100, 0:25, about 1:15 left",
    ]


def test_the_lines_come_by_themselves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shown, "_FIRST", 0.0)
    with CommandProgress() as progress:
        progress.say("tracing [a]")
        deadline = time.monotonic() + 20
        said = ""
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
            said = capsys.readouterr().err
    assert said.startswith("tracing [a]: 0:0")
    with CommandProgress(quiet=True) as progress:
        progress.say("tracing")
        time.sleep(0.7)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_line_that_goes_away(clock: Clock) -> None:
    progress = CommandProgress(["model"], clock=clock)
    written = io.StringIO()
    progress._console = progress._live.console = Console(file=written, force_terminal=True, width=100)
    with progress:
        progress.begin("model")
        progress.count("samples [of all]", 8)(2)
        progress._live.refresh()
    assert "samples [of all]: 2/8" in written.getvalue() and "━" in written.getvalue()
    assert "model               0.0 s" in written.getvalue()


def test_engines_show_their_whole_build_and_the_phase_within(clock: Clock) -> None:
    progress = CommandProgress(clock=clock)
    engines = EngineProgress(progress)
    engines.advance("onnx/decoder.onnx", "Building", 0.25)
    assert progress.words() == "onnx/decoder.onnx, per cent: 25/100, 0:00"
    engines.advance("onnx/decoder.onnx", "Tactics", 0.9)
    assert "25/100, Tactics" in progress.words()
    engines.advance("onnx/vision.onnx", "Building", 0.5)
    assert progress.words().startswith("onnx/vision.onnx, per cent: 50/100")


def test_a_command_with_json_shows_no_progress(tmp_path: object) -> None:
    from edgeprune.cli import main

    result = CliRunner().invoke(main, ["tabletop", f"{tmp_path}/scenes", "--scenes", "2", "--json"])
    assert result.exit_code == 0 and result.stderr == ""
