"""The node without its transport: frames and questions in from any thread, pieces, answers and reports out.

The DDS node (node.py) and a node of rclpy give it their messages and publish what comes out. One thread of its own loads the model
and answers, one question after the other, each about the newest frame and without memory of the one before.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgeprune.errors import EdgePruneError, ImageError, UsageError
from edgeprune.plan.tiers import tier_number
from edgeprune.runtime import Runtime, Stream
from edgeprune.runtime.media.feed import Feed, FeedClosed, FeedTimeout
from edgeprune.runtime.ros2.diagnostics import DiagnosticReport, NodeStatistics
from edgeprune.runtime.ros2.images import CompressedImageMessage, ImageMessage, decode_compressed, decode_image

ON_BUSY = ("cancel", "queue", "refuse")
LONGEST_QUEUE = 16
OnPhase = Callable[[str], None]


@dataclass(frozen=True)
class OutputCallbacks:
    """What the transport does with what comes out. Called from the answering thread, `report` from that of `tick` too.

    `piece`: the next piece of an answer, "" after its last. `answer`: a whole answer. `report`: the state of things.
    """

    piece: Callable[[str], None]
    answer: Callable[[str], None]
    report: Callable[[DiagnosticReport], None]


class QuestionWorker:
    """Answers questions about the newest frame.

    `on_busy`: what a question does that comes while another is waiting or being answered: "cancel" ends those, "queue" waits its
    turn, "refuse" drops the new one. `frame_timeout`: seconds to wait for a frame that is newer than the one asked about last.
    `asking`: keywords of Runtime.ask_latest (fit, tier, deadline_ms, max_tokens, ...). An error in a question goes into the report,
    and the node goes on; where loading fails or a bug shows, `failure` is set, `on_failure` called, and nothing more is answered.
    """

    def __init__(
        self,
        load: Callable[[OnPhase], Runtime],
        outputs: OutputCallbacks,
        *,
        on_busy: str = "cancel",
        frame_timeout: float = 2.0,
        on_failure: Callable[[], None] = lambda: None,
        **asking: Any,
    ) -> None:
        if on_busy not in ON_BUSY:
            raise UsageError(f"{on_busy!r} is no policy for questions while busy.", hint=f"Choose {', '.join(ON_BUSY)}.")
        self._load, self._outputs, self._on_busy, self._on_failure = load, outputs, on_busy, on_failure
        self._asking: dict[str, Any] = {"timeout": frame_timeout} | asking
        self.failure: Exception | None = None
        self._statistics = NodeStatistics()
        self._phase = "loading"
        self._feed: Feed | None = None
        self._early: tuple[Any, float] | None = None  # the newest frame that came before there was a feed, and when
        self._stream: Stream | None = None
        self._busy = self._cancelled = self._closed = False
        self._waiting: deque[str] = deque()
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="edgeprune-answerer", daemon=True)

    def start(self) -> None:
        """Begin to load the model."""
        self._thread.start()

    def image(self, message: ImageMessage) -> None:
        """Take a sensor_msgs/Image. One that cannot be read is reported."""
        self._take(decode_image, message)

    def compressed(self, message: CompressedImageMessage) -> None:
        """Take a sensor_msgs/CompressedImage. One that cannot be read is reported."""
        self._take(decode_compressed, message)

    def report_error(self, kind: str, error: str) -> None:
        """Report a "frame" or a "question" that the transport itself could not read."""
        self._statistics.trouble(kind, "frames refused" if kind == "frame" else "questions failed", error)

    def prompt(self, text: str) -> None:
        """Take a question."""
        self._statistics.add("questions")
        with self._wake:
            busy = self._busy or self._phase != "ready" or bool(self._waiting)
            if busy and self._on_busy == "cancel":
                self._drop_older()
            elif busy and (self._on_busy == "refuse" or len(self._waiting) == LONGEST_QUEUE):
                self._statistics.refuse()
                return
            self._waiting.append(text)
            self._wake.notify()

    def publish_diagnostics(self) -> None:
        """Publish a report; once a second is what /diagnostics expects."""
        with self._wake:
            phase = "busy" if self._busy else self._phase
        dropped = 0 if self._feed is None else self._feed.dropped
        self._outputs.report(self._statistics.report(phase, dropped))

    def close(self, timeout: float = 5.0) -> None:
        """End what is being answered and wait until the thread has ended, or for so many seconds: loading cannot be interrupted."""
        with self._wake:
            self._closed = True
            self._drop_older()
            self._wake.notify()
            if self._feed is not None:
                self._feed.close()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _drop_older(self) -> None:
        for _ in self._waiting:
            self._statistics.add("questions cancelled")
        self._waiting.clear()
        self._cancelled = self._busy
        if self._stream is not None:
            self._stream.cancel()

    def _take(self, read: Callable[[Any], Any], message: ImageMessage | CompressedImageMessage) -> None:
        try:
            picture = read(message)
        except ImageError as error:
            self.report_error("frame", str(error))
            return
        with self._wake:
            feed, came = self._feed, time.monotonic()
            self._statistics.frame(dropped=self._early is not None)
            if feed is None:  # the model still loads
                self._early = (picture, came)
                return
        feed.put(picture, came)

    def _run(self) -> None:
        try:
            model = self._load(self._enter)
            if (tier := self._asking.get("tier")) is not None:
                tier_number(model.tiers, tier)  # refuses one that is not there: at the first question it would be too late
            geometry = model.plan.geometry
            video = model.kind == "video"
            with self._wake:
                self._feed = Feed(window=geometry.frames, fps=geometry.fps if video else None)
                if self._early is not None:
                    self._feed.put(*self._early)
                self._early = None
                self._phase = "ready"
            self.publish_diagnostics()
            while (question := self._next()) is not None:
                self._answer(model, self._feed, question)
                with self._wake:
                    self._busy = self._cancelled = False
                    self._stream = None
                self.publish_diagnostics()
        except Exception as error:  # whoever runs the node raises it
            self.failure = error
            self._on_failure()

    def _enter(self, phase: str) -> None:
        if phase != "ready":  # the feed comes first
            with self._wake:
                self._phase = phase
            self.publish_diagnostics()

    def _next(self) -> str | None:
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return None
            self._busy = True
            return self._waiting.popleft()

    def _answer(self, model: Runtime, feed: Feed, question: str) -> None:
        try:
            stream = self._begin(model, feed, question)
            for piece in stream:
                if piece:
                    self._outputs.piece(piece)
        except FeedClosed:
            pass  # the node is stopping
        except EdgePruneError as error:
            self._statistics.trouble("question", "questions failed", _told(error))
        else:
            self._statistics.ended(stream.receipt)
            if stream.receipt.finish_reason != "cancelled":
                self._outputs.answer(stream.text)
        self._outputs.piece("")

    def _begin(self, model: Runtime, feed: Feed, question: str) -> Stream:
        stream = model.ask_latest(feed, question, **self._asking)
        with self._wake:
            self._stream = stream
            if self._cancelled:  # before there was a stream to cancel
                stream.cancel()
        return stream


def _told(error: EdgePruneError) -> str:
    if isinstance(error, FeedTimeout):
        return f"{error.message} Are images published on a topic that this node hears?"
    return str(error)
