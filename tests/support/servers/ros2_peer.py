"""The other side of a ROS 2 node in tests: a camera, someone who asks, and someone who listens, on loopback alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cyclonedds.core import InstanceState, Policy, Qos, ReadCondition, SampleState, ViewState, WaitSet
from cyclonedds.domain import Domain, DomainParticipant
from cyclonedds.pub import DataWriter
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic
from cyclonedds.util import duration
from loopback import CYCLONEDDS

from edgeprune.runtime.ros2.messages import Clock, CompressedImage, DiagnosticArray, Image, String

WAIT = 20.0
_QOS = Qos(Policy.Reliability.Reliable(duration(seconds=1)), Policy.History.KeepAll)


class Peer:
    """Publishes to a node and keeps what the node publishes: `answers`, `pieces` and `reports`, values by name."""

    def __init__(self, domain: int, node: str, namespace: str = "") -> None:
        self._domain = Domain(domain, CYCLONEDDS)
        self._participant = DomainParticipant(domain)
        self._writers = {
            kind: DataWriter(self._participant, Topic(self._participant, f"rt{topic}", kind), qos=_QOS)
            for kind, topic in (
                (Image, f"{namespace}/image"),
                (CompressedImage, f"{namespace}/image/compressed"),
                (String, f"{node}/prompt"),
                (Clock, "/clock"),
            )
        }
        self._best_effort: list[Any] = []
        self.answers: list[str] = []
        self.pieces: list[str] = []
        self.statuses: list[Any] = []
        self._readers: list[tuple[Any, Callable[[Any], object]]] = [
            (self._reader(f"{node}/answer", String), lambda message: self.answers.append(message.data)),
            (self._reader(f"{node}/answer/pieces", String), lambda message: self.pieces.append(message.data)),
            (self._reader("/diagnostics", DiagnosticArray), lambda message: self.statuses.extend(message.status)),
        ]
        self._waiting = WaitSet(self._participant)
        self._conditions = [
            ReadCondition(reader, ViewState.Any | SampleState.NotRead | InstanceState.Any) for reader, _ in self._readers
        ]
        for condition in self._conditions:
            self._waiting.attach(condition)

    def _reader(self, topic: str, kind: Any) -> Any:
        return DataReader(self._participant, Topic(self._participant, f"rt{topic}", kind), qos=_QOS)

    @property
    def values(self) -> dict[str, str]:
        """The newest report's values by name."""
        return {item.key: item.value for item in self.statuses[-1].values} if self.statuses else {}

    def send(self, message: Any) -> None:
        """Publish a message on the topic of its type."""
        self._writers[type(message)].write(message)

    def send_best_effort(self, topic: str) -> Callable[[Any], None]:
        """Return a function that publishes on a topic with best effort, as cameras do."""
        qos = Qos(Policy.Reliability.BestEffort, Policy.History.KeepLast(1))
        kind = String if topic.endswith("prompt") else Image
        writer = DataWriter(self._participant, Topic(self._participant, f"rt{topic}", kind), qos=qos)
        self._best_effort.append(writer)
        return lambda message: writer.write(message)

    def wait(self, condition: Callable[[], bool], again: Callable[[], None] = lambda: None) -> None:
        """Take in what comes until the condition holds; `again` is called now and then meanwhile."""
        end = time.monotonic() + WAIT
        while True:
            for reader, keep in self._readers:
                for message in reader.take(100):
                    if message.sample_info.valid_data:
                        keep(message)
            if condition():
                return
            assert time.monotonic() < end, (self.answers, self.pieces, self.statuses[-1:])
            again()
            self._waiting.wait(duration(milliseconds=50))

    def wait_for_value(self, name: str, value: int | str) -> None:
        """Wait for a report with this value."""
        self.wait(lambda: self.values.get(name) == str(value))

    def counted(self, name: str) -> int:
        """Return a count of the newest report."""
        return int(self.values[name])

    def close(self) -> None:
        """Leave the domain."""
        self._readers.clear()
        self._writers.clear()
        self._best_effort.clear()
        del self._waiting
        self._conditions.clear()
        del self._participant, self._domain
