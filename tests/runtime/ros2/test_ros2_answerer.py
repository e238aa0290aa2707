"""The node without its transport: which question is answered, about which frame, and what is reported."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from ros2_doubles import WAIT, FakeModel, Listener, answering, frame, header

from edgeprune.cli import main
from edgeprune.errors import EdgePruneError, UsageError, install_command
from edgeprune.runtime.ros2.answerer import LONGEST_QUEUE, QuestionWorker
from edgeprune.runtime.ros2.diagnostics import ERROR, OK, WARN


def test_a_question_is_answered_about_the_newest_frame() -> None:
    model = FakeModel()
    with answering(model, max_tokens=5, tier="low") as (answerer, listener):
        for number in (1, 2, 3):
            answerer.image(frame(number))
        answerer.prompt("what?")
        values = listener.wait_for_value("answers", "1")
        assert listener.answers == ["3:what?"]
        assert listener.pieces == ["3:", "what?", ""]
        assert model.options == {"max_tokens": 5, "tier": "low"}
        assert (values["frames received"], values["frames dropped"]) == ("3", "2")
        assert (values["ttft ms"], values["ms per token"], values["kept tokens"]) == ("12.0", "3.0", "5.0")
        assert values["last error"] == ""


def test_every_question_waits_for_a_frame_of_its_own() -> None:
    model = FakeModel()
    with answering(model, on_busy="queue") as (answerer, listener):
        answerer.image(frame(1))
        answerer.prompt("first")
        answerer.prompt("second")
        listener.wait_for(lambda: len(listener.answers) == 1)
        answerer.image(frame(2))
        listener.wait_for(lambda: len(listener.answers) == 2)
        assert listener.answers == ["1:first", "2:second"]


def test_without_a_frame_the_error_is_reported_and_nothing_is_answered() -> None:
    with answering(FakeModel(), frame_timeout=0.05) as (answerer, listener):
        answerer.prompt("what?")
        values = listener.wait_for_value("questions failed", "1")
        assert "No new frame came within 0.05 s." in values["last error"]
        assert listener.answers == []
        assert listener.pieces == [""]
        assert listener.reports[-1].level == ERROR
        answerer.image(frame(1))
        answerer.prompt("and now?")
        listener.wait_for_value("answers", "1")
        assert listener.reports[-1].level == OK
        assert listener.values["last error"] == values["last error"]


def test_refused_frames_are_the_cause_of_a_question_without_a_frame() -> None:
    with answering(FakeModel(), frame_timeout=0.05) as (answerer, listener):
        depth = frame(1)
        depth.encoding = "16UC1"
        answerer.image(depth)
        answerer.prompt("what?")
        values = listener.wait_for_value("questions failed", "1")
        assert "No frame came that could be read. Images of encoding '16UC1' cannot be read." in values["last error"]
        answerer.image(frame(2))
        answerer.prompt("and now?")
        listener.wait_for_value("answers", "1")
        answerer.prompt("and then?")
        assert "No new frame came" in listener.wait_for_value("questions failed", "2")["last error"]


@pytest.mark.parametrize("on_busy", ["cancel", "queue"])
def test_a_question_that_cannot_be_read_fails_in_its_turn(on_busy: str) -> None:
    with answering(FakeModel(), on_busy=on_busy) as (answerer, listener):
        answerer.report_error("question", "A message on /prompt cannot be read: it is not UTF-8 text.")
        values = listener.wait_for_value("questions failed", "1")
        assert (values["questions"], listener.pieces, listener.answers) == ("1", [""], [])
        assert values["last error"] == "A message on /prompt cannot be read: it is not UTF-8 text."
        assert listener.reports[-1].level == ERROR


def test_a_publisher_that_is_not_heard_is_reported() -> None:
    with answering(FakeModel()) as (answerer, listener):
        answerer.report_unheard("frame", "A publisher on /image is not heard.")
        answerer.publish_diagnostics()
        assert (listener.values["publishers unheard"], listener.values["frames refused"]) == ("1", "0")
        assert (listener.reports[-1].level, listener.reports[-1].message) == (WARN, "A publisher on /image is not heard.")


@pytest.mark.parametrize(
    ("stamp", "captured"),
    [(999_998.5, 999_998.5), (0.0, 1e6), (1_000_000.5, 1e6), (1e6 - 86_401, 1e6), (1e6 - 86_399, 1e6 - 86_399)],
    ids=["stamped", "no stamp", "of the future", "of another clock", "old"],
)
@pytest.mark.parametrize("early", [False, True])
def test_a_frame_is_as_old_as_its_stamp_on_the_ros_clock(stamp: float, captured: float, early: bool) -> None:
    model, loaded, listener, now = FakeModel(), threading.Event(), Listener(), [1e6]

    def load(on_phase: Callable[[str], None]) -> Any:
        assert loaded.wait(WAIT)
        return model

    answerer = QuestionWorker(load, listener.outlets(), frame_timeout=WAIT, clock=lambda: now[0])
    answerer.start()
    if not early:
        loaded.set()
        listener.wait_for_value("phase", "ready")
    answerer.image(frame(1, stamp))
    now[0] += 2
    loaded.set()
    answerer.prompt("what?")
    listener.wait_for_value("answers", "1")
    assert model.shots[0].captured == pytest.approx(captured, abs=1e-3)
    assert model.shots[0].age_ms == pytest.approx(1e3 * (now[0] - captured), abs=1)
    answerer.close()


def test_the_newest_question_cancels_the_one_being_answered() -> None:
    model = FakeModel()
    model.gate.clear()
    with answering(model) as (answerer, listener):
        answerer.image(frame(1))
        answerer.prompt("first")
        listener.wait_for(lambda: listener.pieces == ["1:"])
        answerer.prompt("second")
        listener.wait_for(lambda: listener.pieces == ["1:", ""])
        answerer.image(frame(2))
        values = listener.wait_for_value("answers", "1")
        assert listener.answers == ["2:second"]
        assert values["questions cancelled"] == "1"


def test_questions_wait_in_a_queue_that_has_an_end() -> None:
    model = FakeModel()
    model.gate.clear()
    with answering(model, on_busy="queue") as (answerer, listener):
        answerer.image(frame(0))
        answerer.prompt("first")
        listener.wait_for(lambda: listener.pieces == ["0:"])
        for number in range(LONGEST_QUEUE + 2):
            answerer.prompt(str(number))
        answerer.publish_diagnostics()
        assert listener.values["questions refused"] == "2"
        model.gate.set()
        for number in range(1, LONGEST_QUEUE + 1):
            listener.wait_for(lambda answered=number: len(listener.answers) == answered)  # type: ignore[misc]
            answerer.image(frame(number))
        listener.wait_for_value("answers", str(LONGEST_QUEUE + 1))
        assert [question for question, _ in model.asked] == ["first", *map(str, range(LONGEST_QUEUE))]


def test_questions_are_refused_while_one_is_answered() -> None:
    model = FakeModel()
    model.gate.clear()
    with answering(model, on_busy="refuse") as (answerer, listener):
        answerer.image(frame(1))
        answerer.prompt("first")
        listener.wait_for(lambda: listener.pieces == ["1:"])
        answerer.prompt("second")
        model.gate.set()
        values = listener.wait_for_value("answers", "1")
        assert listener.answers == ["1:first"]
        assert values["questions refused"] == "1"
        assert "refused" in values["last error"]


def test_an_image_that_cannot_be_read_is_reported_until_a_good_one_comes() -> None:
    with answering(FakeModel()) as (answerer, listener):
        bad = frame(1)
        bad.data = b"123"
        answerer.image(bad)
        answerer.compressed(SimpleNamespace(format="jpeg", data=b"x", header=header()))
        answerer.publish_diagnostics()
        assert listener.reports[-1].level == WARN
        assert "Known are: JPEG, PNG" in listener.reports[-1].message
        assert (listener.values["frames refused"], listener.values["frames received"]) == ("2", "0")
        answerer.image(frame(1))
        answerer.publish_diagnostics()
        assert (listener.reports[-1].level, listener.reports[-1].message) == (OK, "ready")


def test_what_comes_while_the_model_loads_is_answered_when_it_is_there() -> None:
    model, loaded, listener = FakeModel(), threading.Event(), Listener()

    def load(on_phase: Callable[[str], None]) -> Any:
        assert loaded.wait(WAIT)
        return model

    answerer = QuestionWorker(load, listener.outlets(), frame_timeout=WAIT)
    answerer.start()
    for number in (1, 2):
        answerer.image(frame(number))
        answerer.prompt(str(number))
    answerer.publish_diagnostics()
    assert (listener.values["phase"], listener.values["frames dropped"]) == ("loading", "1")
    loaded.set()
    values = listener.wait_for_value("answers", "1")
    assert listener.answers == ["2:2"]
    assert (values["frames dropped"], values["questions cancelled"]) == ("1", "1")
    answerer.close()


def test_a_question_that_is_refused_by_the_model_is_reported() -> None:
    with answering(FakeModel()) as (answerer, listener):
        answerer.image(frame(1))
        answerer.prompt(" ")
        assert listener.wait_for_value("questions failed", "1")["last error"] == "The prompt is empty."


@pytest.mark.parametrize("error", [EdgePruneError("no such bundle"), RuntimeError("a bug")])
def test_a_model_that_cannot_be_loaded_is_a_failure(error: Exception) -> None:
    def load(on_phase: Callable[[str], None]) -> Any:
        on_phase("loading")
        raise error

    failed, listener = threading.Event(), Listener()
    answerer = QuestionWorker(load, listener.outlets(), on_failure=failed.set)
    answerer.start()
    assert failed.wait(WAIT)
    assert answerer.failure is error
    assert listener.values["phase"] == "loading"
    answerer.close()


def test_a_tier_that_the_bundle_has_not_is_a_failure() -> None:
    failed = threading.Event()
    answerer = QuestionWorker(lambda on_phase: FakeModel(), Listener().outlets(), on_failure=failed.set, tier="mid")  # type: ignore[arg-type, return-value]
    answerer.start()
    assert failed.wait(WAIT)
    assert str(answerer.failure) == "The bundle has no tier 'mid'. Its tiers are: high, low."


def test_a_bug_while_answering_is_a_failure() -> None:
    failed = threading.Event()
    with answering(FakeModel(), on_failure=failed.set) as (answerer, _):
        answerer.image(frame(1))
        answerer.prompt("bug")
        assert failed.wait(WAIT)
        assert isinstance(answerer.failure, RuntimeError)


@pytest.mark.parametrize("busy", [False, True])
def test_closing_ends_what_is_being_answered(busy: bool) -> None:
    model = FakeModel()
    model.gate.clear()
    with answering(model) as (answerer, listener):
        if busy:
            answerer.image(frame(1))
            answerer.prompt("first")
            listener.wait_for(lambda: listener.pieces == ["1:"])
        else:
            answerer.prompt("first")  # waits for a frame
        answerer.close()
        assert not any(thread.name == "edgeprune-answerer" for thread in threading.enumerate())
        assert listener.answers == []
        assert listener.values["last error"] == ""


def test_no_transport_and_no_torch_is_needed_to_import_it() -> None:
    code = "import sys, edgeprune.runtime.ros2.answerer; print({'cyclonedds', 'zenoh', 'torch', 'rclpy'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cyclonedds", None)
    monkeypatch.setattr("edgeprune.runtime.ros2.node.DDS_HAS_WHEELS", True)
    result = CliRunner().invoke(main, ["ros2", str(tmp_path)])
    assert result.exit_code == 3
    assert f"cyclonedds not installed. Install with: {install_command('ros2')}" in result.output


def test_what_is_no_policy_is_refused() -> None:
    with pytest.raises(UsageError, match="no policy"):
        QuestionWorker(lambda on_phase: FakeModel(), Listener().outlets(), on_busy="never")  # type: ignore[arg-type, return-value]
