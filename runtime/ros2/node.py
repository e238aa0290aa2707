"""What a node is on every transport: its name, topics and callbacks, and the rules of ROS for names and domains."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from edgeprune.errors import MissingExtraError, UsageError, require_extra
from edgeprune.runtime.ros2.diagnostics import DiagnosticReport

DDS_HAS_WHEELS = platform.machine() == "x86_64" and sys.version_info < (3, 14)  # as pyproject.toml says of cyclonedds
LARGEST_DOMAIN = 232  # the last domain whose DDS ports are below 65536
TICK = 1.0  # seconds between reports

_TOKEN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


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

    @property
    def base(self) -> str:
        """The part after the last slash."""
        return self.full.rpartition("/")[2]

    @property
    def status(self) -> str:
        """The name of its status on /diagnostics."""
        return f"{self.full[1:]}: answers"

    def topic(self, name: str) -> str:
        """Return an absolute topic name: "/name" is absolute, "name" relative to the namespace, "~/name" relative to the node."""
        absolute = self.full + name[1:] if name.startswith("~") else name
        if not absolute.startswith("/"):
            absolute = f"{self.namespace}/{name}"
        _check(absolute, name, "topic", hint="For example: image, /camera/image_raw or ~/answer.")
        return absolute


def domain_id(asked: int | None, environment: Mapping[str, str] | None = None) -> int:
    """Return the domain: `asked`, else ROS_DOMAIN_ID, else 0. Raises UsageError for an invalid domain."""
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


@dataclass(frozen=True)
class Input:
    """One subscription. `kind`: "frame" or "question". `type`: the ROS name, such as std_msgs/msg/String.

    `sensor`: ROS's sensor data profile (best effort, keep last 5) instead of reliable with a history of 100.
    """

    kind: str
    topic: str
    type: str
    sensor: bool
    handle: Callable[[Any], None]

    def unreadable(self, error: Exception) -> str:
        """Return the line that says why a message on this topic cannot be read."""
        text = isinstance(error, UnicodeDecodeError) or isinstance(error.__cause__, UnicodeDecodeError)
        reason = "it is not UTF-8 text" if text else str(error).rstrip(".")
        return f"A message on {self.topic} cannot be read: {reason}."


def inputs_of(topics: Topics, inputs: InputCallbacks) -> list[Input]:
    """Return what a node subscribes to.

    Questions come first and the clock last. A transport takes messages in this order and handles them in the opposite one, so that
    each question sees all images that arrived before it.
    """
    found = [Input("question", topics.prompt, "std_msgs/msg/String", False, lambda message: inputs.prompt(message.data))]
    if topics.image is not None:
        found.append(Input("frame", topics.image, "sensor_msgs/msg/Image", True, inputs.image))
    if topics.compressed is not None:
        found.append(Input("frame", topics.compressed, "sensor_msgs/msg/CompressedImage", True, inputs.compressed))
    if (set_clock := inputs.set_clock) is not None:
        found.append(Input("frame", "/clock", "rosgraph_msgs/msg/Clock", True, lambda message: set_clock(_seconds(message.clock))))
    return found


def _seconds(time: Any) -> float:
    return float(time.sec + 1e-9 * time.nanosec)


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


class Node(Protocol):
    """A node on some transport. `piece`, `answer` and `report` publish, and may be called from any thread.

    `notice`: a line for whoever started it, or "". `failure`: what ended the thread that `listen` started.
    """

    notice: str
    failure: Exception | None

    def listen(self, inputs: InputCallbacks) -> None:
        """Subscribe, and pass incoming messages to the callbacks until `close`."""

    def piece(self, text: str) -> None:
        """Publish a piece of an answer."""

    def answer(self, text: str) -> None:
        """Publish a complete answer."""

    def report(self, report: DiagnosticReport) -> None:
        """Publish a report on /diagnostics."""

    def close(self) -> None:
        """Stop listening and leave the domain. Nothing may be published afterwards."""


def transport_of(asked: str | None, environment: Mapping[str, str] | None = None) -> str:
    """Return the transport: `asked`, else the one of RMW_IMPLEMENTATION, else "dds".

    Raises MissingExtraError when its packages are not installed.
    """
    implementation = (os.environ if environment is None else environment).get("RMW_IMPLEMENTATION", "")
    transport = asked or ("zenoh" if implementation == "rmw_zenoh_cpp" else "dds")
    if transport == "zenoh":
        require_extra("ros2", "zenoh", "rosbags", "xxhash")
        return transport
    try:
        require_extra("ros2", "cyclonedds")
    except MissingExtraError as error:
        if DDS_HAS_WHEELS:
            raise
        hint = "There is no wheel of it for this machine. Use --transport zenoh, or see docs/ros2.md."
        raise MissingExtraError("cyclonedds not installed.", hint=hint) from error
    return transport


def open_node(transport: str, name: NodeName, topics: Topics, domain: int) -> Node:
    """Join a domain over a transport, "dds" or "zenoh". Raises EdgePruneError when that fails."""
    if transport == "zenoh":
        from edgeprune.runtime.ros2.zenoh import ZenohNode

        return ZenohNode(name, topics, domain)
    from edgeprune.runtime.ros2.dds import DdsNode

    return DdsNode(name, topics, domain)
