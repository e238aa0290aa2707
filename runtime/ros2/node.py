"""The DDS node: readers, writers and the thread that receives messages, and the rules for ROS names and domains."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cyclonedds.core import (
    DDSException,
    GuardCondition,
    InstanceState,
    Listener,
    Policy,
    Qos,
    ReadCondition,
    SampleState,
    ViewState,
    WaitSet,
)
from cyclonedds.domain import Domain, DomainParticipant
from cyclonedds.pub import DataWriter
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic
from cyclonedds.util import duration

from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.runtime.ros2.diagnostics import DiagnosticReport
from edgeprune.runtime.ros2.messages import (
    Clock,
    CompressedImage,
    DiagnosticArray,
    DiagnosticStatus,
    Header,
    Image,
    KeyValue,
    String,
    Time,
)

LARGEST_DOMAIN = 232  # the last domain whose ports are below 65536
TICK = 1.0  # seconds between reports
AT_ONCE = 8  # messages taken from one reader before the others are read

_TOKEN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = Policy.DataRepresentation(use_cdrv0_representation=True)  # older ROS releases cannot read XCDR2
_UNREAD = ViewState.Any | SampleState.NotRead | InstanceState.Any
# ROS's sensor data profile for images. ROS's default profile for strings, with a longer history for the pieces of an answer.
# A best-effort reader hears writers of any reliability; a reliable one hears reliable writers alone.
SENSOR = Qos(Policy.Reliability.BestEffort, Policy.Durability.Volatile, Policy.History.KeepLast(5), _PLAIN)
TEXT = Qos(
    Policy.Reliability.Reliable(duration(milliseconds=100)), Policy.Durability.Volatile, Policy.History.KeepLast(100), _PLAIN
)
# Policies by their numbers in the DDS specification, section 2.2.3, and DDS-XTypes.
_POLICIES = {2: "durability", 4: "deadline", 6: "ownership", 8: "liveliness", 11: "reliability", 12: "destination order"}
_POLICIES |= {23: "data representation"}


@dataclass(frozen=True)
class NodeName:
    """A node's full name, such as "/robot/edgeprune"."""

    full: str

    @classmethod
    def parse(cls, text: str) -> NodeName:
        """Parse "edgeprune" (in the root namespace) or "/robot/edgeprune". Raises UsageError for an invalid name."""
        full = "/" + text.removeprefix("/")
        _check(full, text, "node name", hint="For example: edgeprune, or /robot/edgeprune.")
        return cls(full)

    @property
    def namespace(self) -> str:
        """The part before the last slash; "" for the root namespace."""
        return self.full.rpartition("/")[0]

    def topic(self, name: str) -> str:
        """Return an absolute topic name: "/name" is absolute, "name" relative to the namespace, "~/name" relative to the node."""
        absolute = self.full + name[1:] if name.startswith("~") else name
        if not absolute.startswith("/"):
            absolute = f"{self.namespace}/{name}"
        _check(absolute, name, "topic", hint="For example: image, /camera/image_raw or ~/answer.")
        return absolute


def dds_topic(name: str) -> str:
    """Return the DDS name of an absolute ROS topic: "/image" is "rt/image"."""
    return f"rt{name}"


def domain_id(asked: int | None, environment: Mapping[str, str] | None = None) -> int:
    """Return the DDS domain: `asked`, else ROS_DOMAIN_ID, else 0. Raises UsageError for an invalid domain."""
    text = str(asked) if asked is not None else (os.environ if environment is None else environment).get("ROS_DOMAIN_ID", "")
    if not text.strip():
        return 0
    if not text.strip().isdecimal() or int(text) > LARGEST_DOMAIN:
        where = "ROS_DOMAIN_ID" if asked is None else "--domain"
        raise UsageError(f"{where} is {text!r}, which is no domain.", hint=f"Give a number from 0 to {LARGEST_DOMAIN}.")
    return int(text)


def _check(absolute: str, given: str, what: str, hint: str) -> None:
    if not all(_TOKEN.fullmatch(token) for token in absolute[1:].split("/")):
        raise UsageError(f"{given!r} is no {what}.", hint=hint)


@dataclass(frozen=True)
class Topics:
    """Absolute topic names. None disables an input."""

    image: str | None
    compressed: str | None
    prompt: str
    answer: str

    @property
    def pieces(self) -> str:
        """The topic for pieces of answers."""
        return f"{self.answer}/pieces"


@dataclass(frozen=True)
class InputCallbacks:
    """Callbacks for incoming messages, called from the node's thread.

    `report_error`: called with "frame" or "question" and the error when a message cannot be read, `report_unheard` likewise when a
    publisher's QoS does not match. `publish_diagnostics`: called once per second. `set_clock`: the time of /clock in seconds, None
    to leave it. `on_failure`: called when the thread ends because another callback raised; the error is the node's `failure`.
    """

    image: Callable[[Any], None]
    compressed: Callable[[Any], None]
    prompt: Callable[[str], None]
    report_error: Callable[[str, str], None]
    report_unheard: Callable[[str, str], None]
    publish_diagnostics: Callable[[], None]
    on_failure: Callable[[], None]
    set_clock: Callable[[float], None] | None = None


class Node:
    """A DDS participant with the topics of one node. `piece`, `answer` and `report` may be called from any thread."""

    def __init__(self, name: NodeName, topics: Topics, domain: int) -> None:
        self._name, self._topics = name, topics
        try:
            self._domain = Domain(domain, _configuration())
            self._participant = DomainParticipant(domain)
            self._answers = self._writer(topics.answer, String)
            self._pieces = self._writer(topics.pieces, String)
            self._diagnostics = self._writer("/diagnostics", DiagnosticArray)
            self._stop = GuardCondition(self._participant)
        except DDSException as error:
            hint = "Check CYCLONEDDS_URI and the network interfaces."
            raise EdgePruneError(f"DDS does not start in domain {domain}: {error}.", hint=hint) from error
        self._thread: threading.Thread | None = None
        self._unheard: deque[tuple[str, str, int]] = deque()  # kind, topic and policy of a mismatch, from DDS's threads
        self.failure: Exception | None = None

    def listen(self, inputs: InputCallbacks) -> None:
        """Subscribe, and pass incoming messages to the callbacks until `close`."""
        topics = self._topics
        sources = [self._source(topics.prompt, String, TEXT, lambda message: inputs.prompt(message.data))]
        if topics.image is not None:
            sources.append(self._source(topics.image, Image, SENSOR, inputs.image))
        if topics.compressed is not None:
            sources.append(self._source(topics.compressed, CompressedImage, SENSOR, inputs.compressed))
        if inputs.set_clock is not None:
            sources.append(self._source("/clock", Clock, SENSOR, _clock_handler(inputs.set_clock)))
        self._thread = threading.Thread(target=self._receive, args=(sources, inputs), name="edgeprune-dds")
        self._thread.start()

    def piece(self, text: str) -> None:
        """Publish a piece of an answer."""
        _write(self._pieces, String(text))

    def answer(self, text: str) -> None:
        """Publish a complete answer."""
        _write(self._answers, String(text))

    def report(self, report: DiagnosticReport) -> None:
        """Publish a report on /diagnostics."""
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        values = [KeyValue(key, value) for key, value in report.values]
        status = DiagnosticStatus(report.level, f"{self._name.full[1:]}: answers", report.message, "", values)
        _write(self._diagnostics, DiagnosticArray(Header(Time(seconds, nanoseconds)), [status]))

    def close(self) -> None:
        """Stop listening and leave the domain. Nothing may be published afterwards."""
        if self._thread is not None:
            self._stop.set(True)
            self._thread.join()
        # Delete children first: DDS deletes an entity's children with it, and their Python objects would delete them again.
        del self._answers, self._pieces, self._diagnostics, self._stop, self._participant, self._domain

    def _writer(self, topic: str, kind: Any) -> Any:
        return DataWriter(self._participant, Topic(self._participant, dds_topic(topic), kind), qos=TEXT)

    def _source(self, topic: str, kind: Any, qos: Qos, handle: Callable[[Any], None]) -> _Source:
        what = "question" if kind is String else "frame"
        listener = Listener(
            on_requested_incompatible_qos=lambda _, status: self._unheard.append((what, topic, status.last_policy_id))
        )
        reader = DataReader(self._participant, Topic(self._participant, dds_topic(topic), kind), qos=qos, listener=listener)
        return _Source(what, topic, reader, handle)

    def _receive(self, sources: list[_Source], inputs: InputCallbacks) -> None:
        try:
            self._receive_until_stopped(sources, inputs)
        except Exception as error:  # raised again by the caller that runs the node
            self.failure = error
            inputs.on_failure()

    def _receive_until_stopped(self, sources: list[_Source], inputs: InputCallbacks) -> None:
        wait_set, due = WaitSet(self._participant), time.monotonic()
        conditions = [ReadCondition(source.reader, _UNREAD) for source in sources]
        for condition in (*conditions, self._stop):
            wait_set.attach(condition)
        while not self._stop.read():
            if time.monotonic() >= due:
                self._report_unheard(inputs)
                inputs.publish_diagnostics()
                due = time.monotonic() + TICK
            wait_set.wait(duration(seconds=max(0.0, due - time.monotonic())))
            # Read questions first and handle them last, so that each question sees all images that arrived before it. The clock is
            # read last and handled first.
            batches = [source.take(inputs.report_error) for source in sources]
            for source, messages in reversed([*zip(sources, batches, strict=True)]):
                for message in messages:
                    source.handle(message)

    def _report_unheard(self, inputs: InputCallbacks) -> None:
        while self._unheard:
            kind, topic, policy = self._unheard.popleft()
            name = _POLICIES.get(policy, f"policy {policy}")
            remedy = " Publish it as reliable." if name == "reliability" else ""
            error = f"A publisher on {topic} is not heard: its QoS ({name}) does not match.{remedy}"
            inputs.report_unheard(kind, error)


@dataclass(frozen=True)
class _Source:
    kind: str
    topic: str
    reader: Any
    handle: Callable[[Any], None]

    def take(self, report_error: Callable[[str, str], None]) -> list[Any]:
        messages: list[Any] = []
        for _ in range(AT_ONCE):  # one at a time, because a message that cannot be read takes those beside it along
            try:
                taken = self.reader.take(1)
            except DDSException:
                raise
            except Exception as error:  # invalid messages raise many types and must not stop the node
                reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error).rstrip(".")
                report_error(self.kind, f"A message on {self.topic} cannot be read: {reason}.")
                continue
            if not taken:
                break
            messages += taken
        return [message for message in messages if message.sample_info.valid_data]  # invalid samples signal that a writer left


class SimulatedTime:
    """The ROS clock of a simulation: the last time that /clock said, in seconds, and 0 before the first."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self._now

    def set(self, seconds: float) -> None:
        """Take over the time of a message."""
        self._now = seconds


def _clock_handler(set_clock: Callable[[float], None]) -> Callable[[Any], None]:
    return lambda message: set_clock(message.clock.sec + 1e-9 * message.clock.nanosec)


def _configuration() -> str:
    # Camera images exceed the default socket buffer. The environment's configuration comes last and overrides ours.
    ours = "<CycloneDDS><Domain><Internal><SocketReceiveBufferSize max='32MB'/></Internal></Domain></CycloneDDS>"
    return ",".join(filter(None, (ours, os.environ.get("CYCLONEDDS_URI"))))


def _write(writer: Any, message: Any) -> None:
    try:
        writer.write(message)
    except DDSException as error:
        if error.code != DDSException.DDS_RETCODE_TIMEOUT:  # a slow subscriber loses messages and does not block the node
            raise
