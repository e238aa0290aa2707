"""The node on Zenoh, as rmw_zenoh_cpp's nodes see it: publishers, subscribers and the thread that hands messages on."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import zenoh
from rosbags.serde import SerdeError

from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.runtime.ros2.definitions import decode, encode, message
from edgeprune.runtime.ros2.diagnostics import DiagnosticReport
from edgeprune.runtime.ros2.node import TICK, Input, InputCallbacks, NodeName, Topics, inputs_of
from edgeprune.runtime.ros2.rmw_zenoh import SENSOR, TEXT, Wire, attachment, gid, has_type_hashes

ROUTER = "tcp/localhost:7447"
_STRING = "std_msgs/msg/String"
# The settings of rmw_zenoh's DEFAULT_RMW_ZENOH_SESSION_CONFIG.json5 that are not Zenoh's own: peers meet through a router on this
# machine, and through nothing else.
_DEFAULTS = {
    "mode": '"peer"',
    "connect/endpoints": f'["{ROUTER}"]',
    "listen/endpoints": '["tcp/localhost:0"]',
    "scouting/multicast/enabled": "false",
    "scouting/gossip/target": '{ router: ["router", "peer"], peer: ["router"] }',
    "timestamping/enabled": "true",
}


class ZenohNode:
    """A Zenoh session with the topics of one node. Its methods and attributes are those of `Node`."""

    def __init__(self, name: NodeName, topics: Topics, domain: int) -> None:
        self._name, self._topics = name, topics
        try:
            self._session = zenoh.open(session_configuration())
        except zenoh.ZError as error:
            hint = "Check ZENOH_SESSION_CONFIG_URI and ZENOH_CONFIG_OVERRIDE."
            raise EdgePruneError(f"Zenoh does not start: {_reason(error)}.", hint=hint) from error
        self._wire = Wire(domain, name, str(self._session.zid()), has_type_hashes())
        self._entities = 0
        self._tokens = [self._session.liveliness().declare_token(self._wire.node_token())]
        self._answers = self._publisher(topics.answer, _STRING)
        self._pieces = self._publisher(topics.pieces, _STRING)
        self._diagnostics = self._publisher("/diagnostics", "diagnostic_msgs/msg/DiagnosticArray")
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._stopped = False
        self.failure: Exception | None = None
        met = [*self._session.info.routers_zid(), *self._session.info.peers_zid()]
        self.notice = "" if met else "No Zenoh router is there yet. ROS has one: ros2 run rmw_zenoh_cpp rmw_zenohd"

    def listen(self, inputs: InputCallbacks) -> None:
        """Subscribe, and pass incoming messages to the callbacks until `close`."""
        sources = [self._source(each) for each in inputs_of(self._topics, inputs)]
        self._thread = threading.Thread(target=self._receive, args=(sources, inputs), name="edgeprune-zenoh")
        self._thread.start()

    def piece(self, text: str) -> None:
        """Publish a piece of an answer."""
        self._pieces.put(message(_STRING, text))

    def answer(self, text: str) -> None:
        """Publish a complete answer."""
        self._answers.put(message(_STRING, text))

    def report(self, report: DiagnosticReport) -> None:
        """Publish a report on /diagnostics."""
        values = [message("diagnostic_msgs/msg/KeyValue", *pair) for pair in report.values]
        fields = (report.level, self._name.status, report.message, "", values)
        status = message("diagnostic_msgs/msg/DiagnosticStatus", *fields)
        header = message("std_msgs/msg/Header", message("builtin_interfaces/msg/Time", *divmod(time.time_ns(), 10**9)), "")
        self._diagnostics.put(message("diagnostic_msgs/msg/DiagnosticArray", header, [status]))

    def close(self) -> None:
        """Stop listening and leave the domain. Nothing may be published afterwards."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        self._session.close()

    def _publisher(self, topic: str, kind: str) -> _Publisher:
        self._entities += 1
        token = self._wire.publisher_token(self._entities, topic, kind, TEXT)
        # As rmw_zenoh does for "reliable, keep last": a slow subscriber loses messages and does not block the node.
        options: dict[str, Any] = {
            "congestion_control": zenoh.CongestionControl.DROP,
            "reliability": zenoh.Reliability.RELIABLE,
        }
        publisher = self._session.declare_publisher(self._wire.topic(topic, kind), **options)
        self._tokens.append(self._session.liveliness().declare_token(token))
        return _Publisher(publisher, gid(token))

    def _source(self, each: Input) -> _Source:
        self._entities += 1
        qos, depth = (SENSOR, 5) if each.sensor else (TEXT, 100)
        source = _Source(each, depth)

        def arrive(sample: zenoh.Sample) -> None:
            with self._wake:
                source.waiting.append(sample.payload)
                self._wake.notify()

        # Called at once by Zenoh's own thread: a thread for each subscriber, the default, would mix up the order of topics.
        handler = zenoh.handlers.Callback(arrive, indirect=False)
        source.subscriber = self._session.declare_subscriber(self._wire.topic_of_any_hash(each.topic, each.type), handler)
        token = self._wire.subscription_token(self._entities, each.topic, each.type, qos)
        self._tokens.append(self._session.liveliness().declare_token(token))
        return source

    def _receive(self, sources: list[_Source], inputs: InputCallbacks) -> None:
        try:
            self._receive_until_stopped(sources, inputs)
        except Exception as error:  # raised again by the caller that runs the node
            self.failure = error
            inputs.on_failure()

    def _receive_until_stopped(self, sources: list[_Source], inputs: InputCallbacks) -> None:
        due = time.monotonic()
        while True:
            if time.monotonic() >= due:
                inputs.publish_diagnostics()
                due = time.monotonic() + TICK
            with self._wake:
                left = max(0.0, due - time.monotonic())
                self._wake.wait_for(lambda: self._stopped or any(source.waiting for source in sources), left)
                if self._stopped:
                    return
                batches = [source.take() for source in sources]
            for source, payloads in reversed([*zip(sources, batches, strict=True)]):
                for payload in payloads:
                    source.handle(payload, inputs)


class _Source:
    """A subscription and the payloads that wait for the node's thread; the oldest give way."""

    def __init__(self, each: Input, depth: int) -> None:
        self._input = each
        self.waiting: deque[Any] = deque(maxlen=depth)
        self.subscriber: Any = None  # what it hears ends with it

    def take(self) -> list[Any]:
        taken = [*self.waiting]
        self.waiting.clear()
        return taken

    def handle(self, payload: Any, inputs: InputCallbacks) -> None:
        try:
            received = decode(self._input.type, payload.to_bytes())
        except SerdeError as error:
            inputs.report_error(self._input.kind, self._input.unreadable(error))
            return
        self._input.handle(received)


class _Publisher:
    """Puts messages with their attachments, from any thread."""

    def __init__(self, publisher: Any, identifier: bytes) -> None:
        self._publisher, self._identifier = publisher, identifier
        self._number, self._lock = 0, threading.Lock()

    def put(self, content: Any) -> None:
        payload = encode(content)
        with self._lock:  # numbers go out in order: a subscriber takes a gap for a loss
            self._number += 1
            self._publisher.put(payload, attachment=attachment(self._number, time.time_ns(), self._identifier))


def session_configuration(environment: Mapping[str, str] | None = None) -> zenoh.Config:
    """Return the configuration that a node of rmw_zenoh would have.

    That is the file of ZENOH_SESSION_CONFIG_URI, or rmw_zenoh's defaults, and over it ZENOH_CONFIG_OVERRIDE: key=value, and more
    after semicolons. Raises UsageError when one of them cannot be read.
    """
    given = os.environ if environment is None else environment
    path = given.get("ZENOH_SESSION_CONFIG_URI")
    try:
        config = zenoh.Config.from_file(path) if path else zenoh.Config()
    except zenoh.ZError as error:
        hint = "Name a Zenoh configuration file, or unset the variable."
        raise UsageError(f"ZENOH_SESSION_CONFIG_URI cannot be read: {_reason(error)}.", hint=hint) from error
    if not path:
        for key, value in _DEFAULTS.items():
            config.insert_json5(key, value)
    for pair in filter(None, given.get("ZENOH_CONFIG_OVERRIDE", "").split(";")):
        key, _, value = pair.partition("=")
        try:
            config.insert_json5(key.strip(), value)
        except zenoh.ZError as error:
            hint = """For example: ZENOH_CONFIG_OVERRIDE='connect/endpoints=["tcp/192.168.1.2:7447"]'"""
            raise UsageError(f"ZENOH_CONFIG_OVERRIDE has {pair!r}: {_reason(error)}.", hint=hint) from error
    return config


def _reason(error: Exception) -> str:
    return str(error).partition(" at /")[0]  # the rest is a place in Zenoh's source
