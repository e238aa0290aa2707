"""The node without its transport. It takes frames and questions from any thread, and emits pieces, answers and reports.

The DDS node (node.py) or an rclpy node passes messages in and publishes the output. A worker thread loads the model and answers
one question at a time. Each question is about the newest frame and starts a new conversation.
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
from edgeprune.runtime.media.feed import Clock, Feed, FeedClosed, FeedTimeout
from edgeprune.runtime.ros2.diagnostics import DiagnosticReport, NodeStatistics
from edgeprune.runtime.ros2.images import CompressedImageMessage, ImageMessage, decode_compressed, decode_image

ON_BUSY = ("cancel", "queue", "refuse")
LONGEST_QUEUE = 16
OLDEST_STAMP = 86_400.0  # seconds; an older header.stamp is of another clock: of a recording, or of the camera's start
OnPhase = Callable[[str], None]


@dataclass(frozen=True)
class OutputCallbacks:
    """Callbacks of the transport. They are called from the worker thread, `report` also from that of `publish_diagnostics`.

    `piece`: the next piece of an answer, "" after its last one. `answer`: a complete answer. `report`: the node's diagnostics.
    """

    piece: Callable[[str], None]
    answer: Callable[[str], None]
    report: Callable[[DiagnosticReport], None]


class QuestionWorker:
    """Answers questions about the newest frame.

    `on_busy`: policy for a question that arrives while another is waiting or being answered: "cancel" cancels the older ones,
    "queue" queues the new one, "refuse" drops it. `frame_timeout`: seconds to wait for a frame newer than the last one used.
    `clock`: the ROS clock in seconds, on which header stamps count: the system's, or a simulation's. `asking`: keyword arguments of
    Runtime.ask_latest (fit, tier, deadline_ms, max_tokens, ...). An error in one question is reported and the worker continues. If
    loading fails or a bug occurs, it sets `failure`, calls `on_failure` and stops.
    """

    def __init__(
        self,
        load: Callable[[OnPhase], Runtime],
        outputs: OutputCallbacks,
        *,
        on_busy: str = "cancel",
        frame_timeout: float = 2.0,
        on_failure: Callable[[], None] = lambda: None,
        clock: Clock = time.time,
        **asking: Any,
    ) -> None:
        if on_busy not in ON_BUSY:
            raise UsageError(f"{on_busy!r} is no policy for questions while busy.", hint=f"Choose {', '.join(ON_BUSY)}.")
        self._load, self._outputs, self._on_busy, self._on_failure = load, outputs, on_busy, on_failure
        self._clock = clock
        self._asking: dict[str, Any] = {"timeout": frame_timeout} | asking
        self.failure: Exception | None = None
        self._statistics = NodeStatistics()
        self._phase = "loading"
        self._feed: Feed | None = None
        self._early: tuple[Any, float] | None = None  # the newest frame received before the feed exists, and its capture time
        self._stream: Stream | None = None
        self._busy = self._cancelled = self._closed = False
        self._waiting: deque[str | UsageError] = deque()  # a question, or why it cannot be read
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="edgeprune-answerer", daemon=True)

    def start(self) -> None:
        """Start the worker thread, which loads the model first."""
        self._thread.start()

    def image(self, message: ImageMessage) -> None:
        """Add a sensor_msgs/Image. A message that cannot be decoded is reported."""
        self._add_frame(decode_image, message)

    def compressed(self, message: CompressedImageMessage) -> None:
        """Add a sensor_msgs/CompressedImage. A message that cannot be decoded is reported."""
        self._add_frame(decode_compressed, message)

    def report_error(self, kind: str, error: str) -> None:
        """Report a message that the transport could not read. `kind`: "frame" or "question", which fails in its turn."""
        if kind == "frame":
            self._statistics.trouble(kind, "frames refused", error)
        else:
            self._add_question(UsageError(error))

    def report_unheard(self, kind: str, error: str) -> None:
        """Report a publisher that the transport cannot hear. `kind`: as above, what it publishes."""
        self._statistics.trouble(kind, "publishers unheard", error)

    def prompt(self, text: str) -> None:
        """Add a question. See `on_busy` for what happens while another is waiting or being answered."""
        self._add_question(text)

    def _add_question(self, question: str | UsageError) -> None:
        self._statistics.add("questions")
        with self._wake:
            busy = self._busy or self._phase != "ready" or bool(self._waiting)
            if busy and self._on_busy == "cancel":
                self._drop_older()
            elif busy and (self._on_busy == "refuse" or len(self._waiting) == LONGEST_QUEUE):
                self._statistics.refuse()
                return
            self._waiting.append(question)
            self._wake.notify()

    def publish_diagnostics(self) -> None:
        """Publish a report. /diagnostics expects one per second."""
        with self._wake:
            phase = "busy" if self._busy else self._phase
        dropped = 0 if self._feed is None else self._feed.dropped
        self._outputs.report(self._statistics.report(phase, dropped))

    def close(self, timeout: float = 5.0) -> None:
        """Cancel the current answer and wait for the worker, at most `timeout` seconds, because loading cannot be interrupted."""
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

    def _add_frame(self, decode: Callable[[Any], Any], message: ImageMessage | CompressedImageMessage) -> None:
        try:
            picture = decode(message)
        except ImageError as error:
            self.report_error("frame", str(error))
            return
        captured = self._capture_time(message.header)
        with self._wake:
            feed = self._feed
            self._statistics.frame(dropped=self._early is not None)
            if feed is None:  # the model is still loading
                self._early = (picture, captured)
                return
        feed.put(picture, captured)

    def _capture_time(self, header: Any) -> float:
        # Seconds of the ROS clock. A stamp of 0, of the future or of another clock says nothing: then the arrival counts.
        now, stamp = self._clock(), header.stamp.sec + 1e-9 * header.stamp.nanosec
        return stamp if 0 < stamp <= now < stamp + OLDEST_STAMP else now

    def _run(self) -> None:
        try:
            model = self._load(self._set_phase)
            if (tier := self._asking.get("tier")) is not None:
                tier_number(model.tiers, tier)  # raises for an unknown tier now instead of at the first question
            geometry = model.plan.geometry
            video = model.kind == "video"
            with self._wake:
                self._feed = Feed(window=geometry.frames, fps=geometry.fps if video else None, clock=self._clock)
                if self._early is not None:
                    self._feed.put(*self._early)
                self._early = None
                self._phase = "ready"
            self.publish_diagnostics()
            while (question := self._next_question()) is not None:
                self._answer(model, self._feed, question)
                with self._wake:
                    self._busy = self._cancelled = False
                    self._stream = None
                self.publish_diagnostics()
        except Exception as error:  # raised again by the caller that runs the node
            self.failure = error
            self._on_failure()

    def _set_phase(self, phase: str) -> None:
        if phase != "ready":  # the worker is ready only once it has a feed
            with self._wake:
                self._phase = phase
            self.publish_diagnostics()

    def _next_question(self) -> str | UsageError | None:
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return None
            self._busy = True
            return self._waiting.popleft()

    def _answer(self, model: Runtime, feed: Feed, question: str | UsageError) -> None:
        try:
            if isinstance(question, UsageError):
                raise question
            stream = self._start_stream(model, feed, question)
            for piece in stream:
                if piece:
                    self._outputs.piece(piece)
        except FeedClosed:
            pass  # the node is stopping
        except EdgePruneError as error:
            self._statistics.trouble("question", "questions failed", self._message(error))
        else:
            self._statistics.ended(stream.receipt)
            if stream.receipt.finish_reason != "cancelled":
                self._outputs.answer(stream.text)
        self._outputs.piece("")

    def _start_stream(self, model: Runtime, feed: Feed, question: str) -> Stream:
        stream = model.ask_latest(feed, question, **self._asking)
        with self._wake:
            self._stream = stream
            if self._cancelled:  # cancelled before the stream existed
                stream.cancel()
        return stream

    def _message(self, error: EdgePruneError) -> str:
        if not isinstance(error, FeedTimeout):
            return str(error)
        if refused := self._statistics.frame_error:
            return f"No frame came that could be read. {refused}"
        return f"{error.message} Are images published on a topic that this node hears?"
