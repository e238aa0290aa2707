"""ROS names and domains."""

from __future__ import annotations

import pytest

from edgeprune.errors import UsageError
from edgeprune.runtime.ros2.node import NodeName, domain_id


@pytest.mark.parametrize(
    ("node", "topic", "expected"),
    [
        ("edgeprune", "image", "/image"),
        ("edgeprune", "~/answer", "/edgeprune/answer"),
        ("/robot/eye", "image", "/robot/image"),
        ("/robot/eye", "~/answer", "/robot/eye/answer"),
        ("/robot/eye", "/camera/image_raw", "/camera/image_raw"),
        ("robot/eye", "image/compressed", "/robot/image/compressed"),
    ],
)
def test_topics_are_resolved_as_ros_does(node: str, topic: str, expected: str) -> None:
    assert NodeName.parse(node).topic(topic) == expected


@pytest.mark.parametrize("name", ["", "/", "1st", "a//b", "a b", "kö", "a/", "-x", "~"])
def test_what_is_no_node_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no node name"):
        NodeName.parse(name)


@pytest.mark.parametrize("name", ["", "/", "~/", "~answer?", "a-b", "/a//b", "a/2b"])
def test_what_is_no_topic_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no topic"):
        NodeName.parse("node").topic(name)


@pytest.mark.parametrize(
    ("asked", "environment", "expected"),
    [
        (None, {}, 0),
        (None, {"ROS_DOMAIN_ID": ""}, 0),
        (None, {"ROS_DOMAIN_ID": "42"}, 42),
        (7, {"ROS_DOMAIN_ID": "42"}, 7),
        (0, {}, 0),
    ],
)
def test_the_domain_comes_from_the_environment(asked: int | None, environment: dict[str, str], expected: int) -> None:
    assert domain_id(asked, environment) == expected


@pytest.mark.parametrize(("asked", "environment"), [(233, {}), (-1, {}), (None, {"ROS_DOMAIN_ID": "x"})])
def test_what_is_no_domain_is_refused(asked: int | None, environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="is no domain"):
        domain_id(asked, environment)
