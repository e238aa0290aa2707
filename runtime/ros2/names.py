"""ROS names: a node's full name, its topics, what they are called on DDS, and the domain."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgeprune.errors import UsageError

_TOKEN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
LARGEST_DOMAIN = 232  # the last whose ports are below 65536


@dataclass(frozen=True)
class NodeName:
    """A node's full name, such as "/robot/edgeprune"."""

    full: str

    @classmethod
    def parse(cls, text: str) -> NodeName:
        """Return the name of "edgeprune" (in the root namespace) or "/robot/edgeprune"; raise UsageError for anything else."""
        full = "/" + text.removeprefix("/")
        _check(full, text, "node name", hint="For example: edgeprune, or /robot/edgeprune.")
        return cls(full)

    @property
    def namespace(self) -> str:
        """The part before the last slash; "" is the root."""
        return self.full.rpartition("/")[0]

    def topic(self, name: str) -> str:
        """Return the absolute name of a topic: of "/name" itself, "name" in the namespace, "~/name" below the node."""
        absolute = self.full + name[1:] if name.startswith("~") else name
        if not absolute.startswith("/"):
            absolute = f"{self.namespace}/{name}"
        _check(absolute, name, "topic", hint="For example: image, /camera/image_raw or ~/answer.")
        return absolute


def dds_topic(name: str) -> str:
    """Return what DDS calls the ROS topic of an absolute name: "/image" is "rt/image"."""
    return f"rt{name}"


def domain_id(asked: int | None, environment: Mapping[str, str] | None = None) -> int:
    """Return the DDS domain: what was asked for, or ROS_DOMAIN_ID, or 0. Raises UsageError for what is no domain."""
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
