"""The node on DDS: readers, writers and the thread that receives messages."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
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

from edgeprune.errors import EdgePruneError
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
from edgeprune.runtime.ros2.node import TICK, Input, InputCallbacks, NodeName, Topics, inputs_of

TYPES: dict[str, Any] = {
    "rosgraph_msgs/msg/Clock": Clock,
    "sensor_msgs/msg/CompressedImage": CompressedImage,
    "sensor_msgs/msg/Image": Image,
    "std_msgs/msg/String": String,
}
AT_ONCE = 8  # messages taken from one reader before the others are read

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


def dds_topic(name: str) -> str:
    """Return the DDS name of an absolute ROS topic: "/image" is "rt/image"."""
    return f"rt{name}"


class DdsNode:
    """A DDS participant with the topics of one node. Its methods and attributes are those of `Node`."""

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
        self.notice = ""

    def listen(self, inputs: InputCallbacks) -> None:
        """Subscribe, and pass incoming messages to the callbacks until `close`."""
        sources = [self._source(each) for each in inputs_of(self._topics, inputs)]
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
        status = DiagnosticStatus(report.level, self._name.status, report.message, "", values)
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

    def _source(self, each: Input) -> _Source:
        def mismatch(_: Any, status: Any) -> None:
            self._unheard.append((each.kind, each.topic, status.last_policy_id))

        topic = Topic(self._participant, dds_topic(each.topic), TYPES[each.type])
        listener = Listener(on_requested_incompatible_qos=mismatch)
        return _Source(each, DataReader(self._participant, topic, qos=SENSOR if each.sensor else TEXT, listener=listener))

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
            batches = [source.take(inputs.report_error) for source in sources]
            for source, messages in reversed([*zip(sources, batches, strict=True)]):
                for message in messages:
                    source.input.handle(message)

    def _report_unheard(self, inputs: InputCallbacks) -> None:
        while self._unheard:
            kind, topic, policy = self._unheard.popleft()
            name = _POLICIES.get(policy, f"policy {policy}")
            remedy = " Publish it as reliable." if name == "reliability" else ""
            error = f"A publisher on {topic} is not heard: its QoS ({name}) does not match.{remedy}"
            inputs.report_unheard(kind, error)


@dataclass(frozen=True)
class _Source:
    input: Input
    reader: Any

    def take(self, report_error: Callable[[str, str], None]) -> list[Any]:
        messages: list[Any] = []
        for _ in range(AT_ONCE):  # one at a time, because a message that cannot be read takes those beside it along
            try:
                taken = self.reader.take(1)
            except DDSException:
                raise
            except Exception as error:  # invalid messages raise many types and must not stop the node
                report_error(self.input.kind, self.input.unreadable(error))
                continue
            if not taken:
                break
            messages += taken
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
