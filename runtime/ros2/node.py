"""The DDS node: readers, writers and the thread that receives messages, and the rules for ROS names and domains."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cyclonedds.core import DDSException, GuardCondition, InstanceState, Policy, Qos, ReadCondition, SampleState, ViewState, WaitSet
from cyclonedds.domain import Domain, DomainParticipant
from cyclonedds.pub import DataWriter
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic
from cyclonedds.util import duration

from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.runtime.ros2.diagnostics import DiagnosticReport
from edgeprune.runtime.ros2.messages import (
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
SENSOR = Qos(Policy.Reliability.BestEffort, Policy.Durability.Volatile, Policy.History.KeepLast(5), _PLAIN)
TEXT = Qos(
    Policy.Reliability.Reliable(duration(milliseconds=100)), Policy.Durability.Volatile, Policy.History.KeepLast(100), _PLAIN
)


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

    `report_error`: called with "frame" or "question" and the error when a message cannot be read. `publish_diagnostics`: called
    once per second.
    """

    image: Callable[[Any], None]
    compressed: Callable[[Any], None]
    prompt: Callable[[str], None]
    report_error: Callable[[str, str], None]
    publish_diagnostics: Callable[[], None]


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

    def listen(self, inputs: InputCallbacks) -> None:
        """Subscribe, and pass incoming messages to the callbacks until `close`."""
        topics = self._topics
        sources = [self._source(topics.prompt, String, TEXT, lambda message: inputs.prompt(message.data))]
        if topics.image is not None:
            sources.append(self._source(topics.image, Image, SENSOR, inputs.image))
        if topics.compressed is not None:
            sources.append(self._source(topics.compressed, CompressedImage, SENSOR, inputs.compressed))
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
        reader = DataReader(self._participant, Topic(self._participant, dds_topic(topic), kind), qos=qos)
        return _Source("question" if kind is String else "frame", topic, reader, handle)

    def _receive(self, sources: list[_Source], inputs: InputCallbacks) -> None:
        wait_set, due = WaitSet(self._participant), time.monotonic()
        conditions = [ReadCondition(source.reader, _UNREAD) for source in sources]
        for condition in (*conditions, self._stop):
            wait_set.attach(condition)
        while not self._stop.read():
            if time.monotonic() >= due:
                inputs.publish_diagnostics()
                due = time.monotonic() + TICK
            wait_set.wait(duration(seconds=max(0.0, due - time.monotonic())))
            # Read questions first and handle them last, so that each question sees all images that arrived before it.
            batches = [source.take(inputs.report_error) for source in sources]
            for source, messages in reversed([*zip(sources, batches, strict=True)]):
                for message in messages:
                    source.handle(message)


@dataclass(frozen=True)
class _Source:
    kind: str
    topic: str
    reader: Any
    handle: Callable[[Any], None]

    def take(self, report_error: Callable[[str, str], None]) -> list[Any]:
        try:
            messages = self.reader.take(AT_ONCE)
        except Exception as error:  # invalid messages raise many types and must not stop the node
            report_error(self.kind, f"A message on {self.topic} cannot be read: {error}.")
            return []
        return [message for message in messages if message.sample_info.valid_data]  # invalid samples signal that a writer left


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
