"""The other side of a node on Zenoh in tests: what a router and rmw_zenoh's nodes would be, on loopback alone.

Keys, hashes and QoS are written out as rmw_zenoh has them, and messages are written with the types of ROS 2 Jazzy.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import zenoh
from rosbags.typesys import Stores, get_typestore

WAIT = float(os.environ.get("EDGEPRUNE_TEST_WAIT", "20"))  # seconds; `make test-arm` has more for an emulated node
JAZZY = get_typestore(Stores.ROS2_JAZZY)
STRING = "std_msgs::msg::dds_::String_/RIHS01_df668c740482bbd48fb39d76a70dfd4bd59db1288021743503259e948f6b1a18"
IMAGE = "sensor_msgs::msg::dds_::Image_/RIHS01_d31d41a9a4c4bc8eae9be757b0beed306564f7526c88ea6a4588fb9582527d47"
DIAGNOSTICS = "diagnostic_msgs::msg::dds_::DiagnosticArray_/RIHS01_5a8a36efb05fb25070fa0fb3810290c0e6cd4862b54a8fb975a1ee8dc55a333e"


class ZenohPeer:
    """A router's session that publishes to /eye and keeps what it publishes: `answers`, `pieces`, `attachments`, `statuses`."""

    def __init__(self, port: int, domain: int) -> None:
        config = zenoh.Config()
        for key, value in {
            "mode": '"router"',
            "listen/endpoints": f'["tcp/127.0.0.1:{port}"]',
            "connect/endpoints": "[]",
            "scouting/multicast/enabled": "false",
        }.items():
            config.insert_json5(key, value)
        self._session = zenoh.open(config)
        self.answers: list[str] = []
        self.pieces: list[str] = []
        self.attachments: list[tuple[int, int, int, bytes]] = []
        self.statuses: list[Any] = []
        self._domain, self._number = domain, 0
        self._subscribers = [
            self._subscribe(f"{domain}/eye/answer/{STRING}", self._on_answer),
            self._subscribe(f"{domain}/eye/answer/pieces/{STRING}", lambda s: self.pieces.append(self._text(s))),
            self._subscribe(f"{domain}/diagnostics/{DIAGNOSTICS}", self._on_status),
        ]

    def _subscribe(self, key: str, handle: Callable[[Any], None]) -> Any:
        return self._session.declare_subscriber(key, zenoh.handlers.Callback(handle, indirect=False))

    def _text(self, sample: Any) -> str:
        message: Any = JAZZY.deserialize_cdr(sample.payload.to_bytes(), "std_msgs/msg/String")
        return str(message.data)

    def _on_answer(self, sample: Any) -> None:
        self.attachments.append(struct.unpack("<qqB16s", sample.attachment.to_bytes()))
        self.answers.append(self._text(sample))

    def _on_status(self, sample: Any) -> None:
        message: Any = JAZZY.deserialize_cdr(sample.payload.to_bytes(), "diagnostic_msgs/msg/DiagnosticArray")
        self.statuses += message.status

    @property
    def values(self) -> dict[str, str]:
        """The newest report's values by name."""
        return {item.key: item.value for item in self.statuses[-1].values} if self.statuses else {}

    def tokens(self) -> list[str]:
        """Return the liveliness tokens of the domain."""
        return sorted(str(reply.ok.key_expr) for reply in self._session.liveliness().get(f"@ros2_lv/{self._domain}/**"))

    def send(self, topic: str, payload: bytes, of: str = STRING) -> None:
        """Put a CDR message on a topic, with rmw_zenoh's attachment."""
        self._number += 1
        attachment = struct.pack("<qqB16s", self._number, time.time_ns(), 16, b"peer".ljust(16, b"\1"))
        self._session.put(f"{self._domain}/{topic}/{of}", payload, attachment=attachment)

    def send_text(self, topic: str, text: str, of: str = STRING) -> None:
        """Put a std_msgs/String."""
        kind = JAZZY.types["std_msgs/msg/String"]
        self.send(topic, bytes(JAZZY.serialize_cdr(kind(text), "std_msgs/msg/String")), of)

    def send_image(self, topic: str, pixels: Any) -> None:
        """Put an rgb8 sensor_msgs/Image of pixels [height, width, 3]."""
        types, (height, width, _) = JAZZY.types, pixels.shape
        header = types["std_msgs/msg/Header"](types["builtin_interfaces/msg/Time"](0, 0), "camera")
        image = types["sensor_msgs/msg/Image"](header, height, width, "rgb8", 0, 3 * width, pixels.reshape(-1))
        self.send(topic, bytes(JAZZY.serialize_cdr(image, "sensor_msgs/msg/Image")), IMAGE)

    def wait(self, condition: Callable[[], bool], again: Callable[[], None] = lambda: None) -> None:
        """Wait until the condition holds; `again` is called now and then meanwhile."""
        end = time.monotonic() + WAIT
        while not condition():
            seen = SimpleNamespace(answers=self.answers, pieces=self.pieces, values=self.values)
            assert time.monotonic() < end, seen
            again()
            time.sleep(0.02)

    def close(self) -> None:
        """Leave."""
        self._session.close()
