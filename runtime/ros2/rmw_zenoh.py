"""How rmw_zenoh_cpp writes ROS 2 on Zenoh: keys, liveliness tokens, QoS, identifiers of publishers, and attachments.

Source: ros2/rmw_zenoh, docs/design.md and rmw_zenoh_cpp/src/detail: liveliness_utils.cpp, attachment_helpers.cpp. Attachments have
the form of rmw_zenoh_cpp 0.2.4 (Jazzy), 0.6.0 (Kilted) and 0.1.2 (Humble), and of what came later; before, it was another (pull
request 601).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import xxhash

from edgeprune.runtime.ros2.definitions import type_hash
from edgeprune.runtime.ros2.node import NodeName

# <reliability>:<durability>:<history>,<depth>:<deadline>:<lifespan>:<liveliness>, in numbers of rmw/types.h. What is empty has
# rmw_zenoh's default: reliable, volatile, keep last, no limits of time.
SENSOR = "2::,5:,:,:,,"  # 2: best effort
TEXT = "::,100:,:,:,,"

_LOW = (1 << 64) - 1


@dataclass(frozen=True)
class Wire:
    """What stands in the keys of one node: its domain, name and Zenoh session, and whether its ROS has type hashes."""

    domain: int
    name: NodeName
    session: str
    hashes: bool = True

    def topic(self, topic: str, kind: str) -> str:
        """Return the key on which a publisher of an absolute topic puts messages of a type."""
        return f"{self.domain}/{topic.strip('/')}/{_mangled(kind)}/{self._hash(kind)}"

    def topic_of_any_hash(self, topic: str, kind: str) -> str:
        """Return the key that hears all publishers of a topic and type, those of Humble included, which has no hashes."""
        return f"{self.domain}/{topic.strip('/')}/{_mangled(kind)}/*"

    def node_token(self) -> str:
        """Return the liveliness token of the node, number 0 of its session."""
        return self._token(0, "NN")

    def publisher_token(self, number: int, topic: str, kind: str, qos: str) -> str:
        """Return the token of a publisher. `number`: unique in the session."""
        return f"{self._token(number, 'MP')}/{self._endpoint(topic, kind, qos)}"

    def subscription_token(self, number: int, topic: str, kind: str, qos: str) -> str:
        """Return the token of a subscription."""
        return f"{self._token(number, 'MS')}/{self._endpoint(topic, kind, qos)}"

    def _token(self, number: int, entity: str) -> str:
        # session, number of the node, number of the entity, entity, enclave (none: its slash alone), namespace, name
        namespace = (self.name.namespace or "/").replace("/", "%")
        return f"@ros2_lv/{self.domain}/{self.session}/0/{number}/{entity}/%/{namespace}/{self.name.base}"

    def _endpoint(self, topic: str, kind: str, qos: str) -> str:
        return f"{topic.replace('/', '%')}/{_mangled(kind)}/{self._hash(kind)}/{qos}"

    def _hash(self, kind: str) -> str:
        return type_hash(kind) if self.hashes else "TypeHashNotSupported"


def has_type_hashes(environment: Mapping[str, str] | None = None) -> bool:
    """Return whether the ROS around has type hashes: every one but Humble, by ROS_DISTRO."""
    return (os.environ if environment is None else environment).get("ROS_DISTRO") != "humble"


def _mangled(kind: str) -> str:
    package, middle, name = kind.split("/")
    return f"{package}::{middle}::dds_::{name}_"


def gid(token: str) -> bytes:
    """Return the 16 bytes that identify the publisher of a token: its XXH3 hash, the lower half first."""
    number = xxhash.xxh3_128_intdigest(token.encode())
    return struct.pack("<QQ", number & _LOW, number >> 64)


def attachment(number: int, nanoseconds: int, identifier: bytes) -> bytes:
    """Return what goes with a message: its number from 1, when it was published, and the publisher's gid with its length."""
    return struct.pack("<qqB", number, nanoseconds, len(identifier)) + identifier
