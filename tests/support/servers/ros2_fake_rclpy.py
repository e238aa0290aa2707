"""A stand-in for rclpy and the message packages: the names that examples/ros2 uses, and nothing behind them.

Signatures are rclpy's. Messages take keywords as ROS's do and have its types: the level of a DiagnosticStatus is one byte.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

WAIT = 20.0


class Publisher:
    """Keeps what was published and lets others wait for it."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self._changed = threading.Condition()

    def publish(self, msg: Any) -> None:
        """Keep a message."""
        with self._changed:
            self.messages.append(msg)
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[list[Any]], bool]) -> None:
        """Wait until the messages are as they should be."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.messages), WAIT), self.messages[-1:]


class Node:
    """Keeps publishers, subscriptions and timers by name; parameters are those of the class attribute."""

    overrides: ClassVar[dict[str, Any]] = {}

    def __init__(self, node_name: str) -> None:
        self.name = node_name
        self.publishers: dict[str, tuple[type, Publisher, int]] = {}
        self.subscriptions: dict[str, tuple[type, Callable[[Any], None], Any]] = {}
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.destroyed = False

    def declare_parameter(self, name: str, value: Any = None) -> Any:
        """Return the parameter: what was set, or the default, of the same type."""
        chosen = self.overrides.get(name, value)
        assert type(chosen) is type(value), name
        return SimpleNamespace(value=chosen)

    def create_publisher(self, msg_type: type, topic: str, qos_profile: int) -> Publisher:
        """Return a publisher."""
        self.publishers[topic] = (msg_type, Publisher(), qos_profile)
        return self.publishers[topic][1]

    def create_subscription(self, msg_type: type, topic: str, callback: Callable[[Any], None], qos_profile: Any) -> None:
        """Keep the callback."""
        self.subscriptions[topic] = (msg_type, callback, qos_profile)

    def create_timer(self, timer_period_sec: float, callback: Callable[[], None]) -> None:
        """Keep the callback."""
        self.timers.append((timer_period_sec, callback))

    def get_fully_qualified_name(self) -> str:
        """Return the name with its namespace."""
        return f"/{self.name}"

    def get_clock(self) -> Any:
        """Return a clock that stands."""
        return SimpleNamespace(now=lambda: SimpleNamespace(to_msg=lambda: "now", nanoseconds=5 * 10**9))

    def destroy_node(self) -> None:
        """Note it."""
        self.destroyed = True


class ExternalShutdownException(Exception):
    """Raised by spin when the context is shut down."""


@dataclass
class String:
    """std_msgs/String."""

    data: str = ""


@dataclass
class KeyValue:
    """diagnostic_msgs/KeyValue."""

    key: str = ""
    value: str = ""


@dataclass
class DiagnosticStatus:
    """diagnostic_msgs/DiagnosticStatus."""

    level: bytes = b"\0"
    name: str = ""
    message: str = ""
    hardware_id: str = ""
    values: list[KeyValue] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert isinstance(self.level, bytes)
        assert len(self.level) == 1


@dataclass
class DiagnosticArray:
    """diagnostic_msgs/DiagnosticArray."""

    header: Any = field(default_factory=lambda: SimpleNamespace(stamp=None))
    status: list[DiagnosticStatus] = field(default_factory=list)


def _unstamped() -> Any:
    return SimpleNamespace(stamp=SimpleNamespace(sec=0, nanosec=0))


@dataclass
class Image:
    """sensor_msgs/Image."""

    height: int = 0
    width: int = 0
    encoding: str = ""
    step: int = 0
    data: Any = b""
    is_bigendian: int = 0
    header: Any = field(default_factory=_unstamped)


@dataclass
class CompressedImage:
    """sensor_msgs/CompressedImage."""

    format: str = ""
    data: Any = b""
    header: Any = field(default_factory=_unstamped)


SENSOR_DATA = object()


def modules(spin: Callable[[Node], None]) -> dict[str, ModuleType]:
    """Return the modules by name; `spin` is what rclpy.spin does."""
    calls = {"init": lambda: None, "spin": spin, "try_shutdown": lambda: None}
    contents: dict[str, dict[str, Any]] = {
        "rclpy": calls,
        "rclpy.node": {"Node": Node},
        "rclpy.qos": {"qos_profile_sensor_data": SENSOR_DATA},
        "rclpy.executors": {"ExternalShutdownException": ExternalShutdownException},
        "std_msgs": {},
        "std_msgs.msg": {"String": String},
        "sensor_msgs": {},
        "sensor_msgs.msg": {"Image": Image, "CompressedImage": CompressedImage},
        "diagnostic_msgs": {},
        "diagnostic_msgs.msg": {
            "DiagnosticArray": DiagnosticArray,
            "DiagnosticStatus": DiagnosticStatus,
            "KeyValue": KeyValue,
        },
    }
    made = {name: ModuleType(name) for name in contents}
    for name, members in contents.items():
        vars(made[name]).update(members)
    return made
