"""Real Zenoh between processes: the command in one, a router with a camera and someone who asks in another."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("zenoh", reason="eclipse-zenoh is not installed")

import xxhash
from loopback import free_port, zenoh_override
from ros2_zenoh_peer import WAIT, ZenohPeer
from rosbags.typesys import Stores, get_typestore

from edgeprune.bundle import Bundle
from edgeprune.errors import EdgePruneError, MissingExtraError, UsageError
from edgeprune.runtime import load
from edgeprune.runtime.ros2 import node as nodes
from edgeprune.runtime.ros2.definitions import _FIELDS, decode, encode, message, type_hash
from edgeprune.runtime.ros2.node import NodeName, Topics, transport_of
from edgeprune.runtime.ros2.rmw_zenoh import SENSOR, TEXT, Wire, attachment, gid, has_type_hashes
from edgeprune.runtime.ros2.zenoh import ZenohNode, session_configuration

PROMPT = "What colour is the cube?"
DOMAIN = 7
# Without DDS, as on a Jetson.
NODE_PYTHON = os.environ.get("EDGEPRUNE_NODE_PYTHON", sys.executable)  # `make test-arm`: that of another processor
COMMAND = [NODE_PYTHON, "-c", "import sys; sys.modules['cyclonedds'] = None; from edgeprune.cli import main; main()", "ros2"]


def start(port: int, *arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {
        "RMW_IMPLEMENTATION": "rmw_zenoh_cpp",
        "ZENOH_CONFIG_OVERRIDE": zenoh_override(port),
        "ROS_DOMAIN_ID": str(DOMAIN),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("ROS_DISTRO", None)
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_node_answers_what_rmw_zenoh_sends_and_is_in_its_graph(tiny_bundle: Bundle) -> None:
    port = free_port()
    peer = ZenohPeer(port, DOMAIN)
    process = start(port, tiny_bundle.path, "--node", "eye", "--image-topic", "/camera/image", "--max-tokens", 20, "--threads", 1)
    try:
        peer.wait(lambda: peer.values.get("phase") == "ready")
        pixels = np.random.default_rng(1).integers(0, 256, (84, 112, 3), np.uint8)
        expected = load(tiny_bundle.path, threads=1).generate(pixels, PROMPT, max_tokens=20).text

        def ask(topic_type: str) -> None:
            answers = len(peer.answers)
            peer.send_image("camera/image", pixels)
            peer.send_text("eye/prompt", PROMPT, of=topic_type)
            peer.wait(lambda: len(peer.answers) > answers and peer.pieces[-1:] == [""])

        before = time.time_ns()
        ask("std_msgs::msg::dds_::String_/RIHS01_df668c740482bbd48fb39d76a70dfd4bd59db1288021743503259e948f6b1a18")
        ask("std_msgs::msg::dds_::String_/TypeHashNotSupported")  # a publisher of Humble
        assert peer.answers == [expected, expected]
        assert "".join(peer.pieces) == 2 * expected

        tokens = peer.tokens()
        session = tokens[0].split("/")[2]
        lines = [
            "0/NN/%/%/eye",
            f"1/MP/%/%/eye/%eye%answer/std_msgs::msg::dds_::String_/{type_hash('std_msgs/msg/String')}/::,100:,:,:,,",
            f"2/MP/%/%/eye/%eye%answer%pieces/std_msgs::msg::dds_::String_/{type_hash('std_msgs/msg/String')}/::,100:,:,:,,",
            "3/MP/%/%/eye/%diagnostics/diagnostic_msgs::msg::dds_::DiagnosticArray_/"
            f"{type_hash('diagnostic_msgs/msg/DiagnosticArray')}/::,100:,:,:,,",
            f"4/MS/%/%/eye/%eye%prompt/std_msgs::msg::dds_::String_/{type_hash('std_msgs/msg/String')}/::,100:,:,:,,",
            f"5/MS/%/%/eye/%camera%image/sensor_msgs::msg::dds_::Image_/{type_hash('sensor_msgs/msg/Image')}/2::,5:,:,:,,",
        ]
        assert tokens == [f"@ros2_lv/{DOMAIN}/{session}/0/{line}" for line in lines]
        identifier = xxhash.xxh3_128_digest(tokens[1].encode())[::-1]  # both halves, the low one first
        assert [(number, length, of) for number, _, length, of in peer.attachments] == [(1, 16, identifier), (2, 16, identifier)]
        assert before < peer.attachments[0][1] < peer.attachments[1][1] < time.time_ns()

        peer.send("eye/prompt", bytes.fromhex("0001000003000000fffe00"))
        peer.wait(lambda: peer.values["questions failed"] == "1")
        assert peer.values["last error"] == "A message on /eye/prompt cannot be read: it is not UTF-8 text."
        peer.send("camera/image", b"\0\1\0\0", of="sensor_msgs::msg::dds_::Image_/TypeHashNotSupported")
        peer.wait(lambda: peer.values["frames refused"] == "1")

        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=WAIT)
        assert process.returncode == 0, errors
        topics = "images on /camera/image, questions on /eye/prompt, answers on /eye/answer"
        assert errors.splitlines() == [f"/eye in domain {DOMAIN} over zenoh: {topics}", "ready"]
        peer.wait(lambda: peer.tokens() == [])
    finally:
        process.kill()
        process.communicate()
        peer.close()


def test_hashes_are_those_of_the_distributions() -> None:
    assert type_hash("std_msgs/msg/String") == "RIHS01_df668c740482bbd48fb39d76a70dfd4bd59db1288021743503259e948f6b1a18"
    for store in (Stores.ROS2_IRON, Stores.ROS2_JAZZY, Stores.ROS2_KILTED, Stores.LATEST):
        whole = get_typestore(store)
        assert {kind: type_hash(kind) for kind in _FIELDS} == {kind: whole.hash_rihs01(kind) for kind in _FIELDS}


def test_bytes_are_those_of_the_cdr_rules() -> None:
    values = [message("diagnostic_msgs/msg/KeyValue", "a", "bcd")]
    status = message("diagnostic_msgs/msg/DiagnosticStatus", 2, "n", "m", "", values)
    header = message("std_msgs/msg/Header", message("builtin_interfaces/msg/Time", 1, 2), "")
    expected = (
        "00010000 01000000 02000000 01000000 00 000000 01000000 02 000000 02000000 6e00 0000 02000000 6d00 0000 01000000 00 000000"
        " 01000000 02000000 6100 0000 04000000 62636400"
    )
    array = message("diagnostic_msgs/msg/DiagnosticArray", header, [status])
    assert encode(array) == bytes.fromhex(expected)
    assert decode("diagnostic_msgs/msg/DiagnosticArray", encode(array)) == array


def test_keys_tokens_and_attachments_are_rmw_zenohs() -> None:
    wire = Wire(3, NodeName.parse("/robot/eye"), "aac3178e146ba6f1fc6e6a4085e77f21")
    string = "std_msgs::msg::dds_::String_/RIHS01_df668c740482bbd48fb39d76a70dfd4bd59db1288021743503259e948f6b1a18"
    assert wire.topic("/robot/eye/answer", "std_msgs/msg/String") == f"3/robot/eye/answer/{string}"
    assert wire.node_token() == "@ros2_lv/3/aac3178e146ba6f1fc6e6a4085e77f21/0/0/NN/%/%robot/eye"
    token = wire.publisher_token(1, "/robot/eye/answer", "std_msgs/msg/String", TEXT)
    assert token == f"@ros2_lv/3/aac3178e146ba6f1fc6e6a4085e77f21/0/1/MP/%/%robot/eye/%robot%eye%answer/{string}/::,100:,:,:,,"
    assert SENSOR == "2::,5:,:,:,,"
    humble = Wire(3, NodeName.parse("eye"), "aa", hashes=has_type_hashes({"ROS_DISTRO": "humble"}))
    assert humble.topic("/a", "std_msgs/msg/String") == "3/a/std_msgs::msg::dds_::String_/TypeHashNotSupported"
    assert has_type_hashes({"ROS_DISTRO": "jazzy"})
    # Computed by rmw_zenoh's own simplified_xxhash3.cpp, compiled alone: 300 times "a".
    assert gid("a" * 300) == struct.pack("<QQ", 0xC1D17581D8EB7E21, 0x5E563F2CB28D2005)
    assert gid("a" * 100) == struct.pack("<QQ", 0x48FB02115FE96A8A, 0x7D09CDCCBC6BEAD2)
    assert attachment(1, 2, bytes(range(16))).hex() == "0100000000000000020000000000000010" + bytes(range(16)).hex()


def test_the_transport_is_the_one_asked_for_or_that_of_ros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "require_extra", lambda *_: None)
    assert transport_of("zenoh", {"RMW_IMPLEMENTATION": "rmw_cyclonedds_cpp"}) == "zenoh"
    assert transport_of(None, {"RMW_IMPLEMENTATION": "rmw_zenoh_cpp"}) == "zenoh"
    assert transport_of(None, {}) == "dds"


def test_without_a_wheel_for_dds_zenoh_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "DDS_HAS_WHEELS", False)  # a Jetson
    monkeypatch.setitem(sys.modules, "cyclonedds", None)
    with pytest.raises(MissingExtraError, match=r"no wheel of it for this machine\. Use --transport zenoh"):
        transport_of(None, {})


def test_the_session_is_configured_as_rmw_zenohs(tmp_path: Path) -> None:
    assert session_configuration({}).get_json("connect/endpoints") == '["tcp/localhost:7447"]'
    changed = session_configuration({"ZENOH_CONFIG_OVERRIDE": 'mode="client";connect/endpoints=["tcp/10.0.0.1:7447"]'})
    assert (changed.get_json("mode"), changed.get_json("connect/endpoints")) == ('"client"', '["tcp/10.0.0.1:7447"]')
    file = tmp_path / "session.json5"
    file.write_text('{mode: "peer", connect: {endpoints: ["tcp/127.0.0.1:9"]}}')
    assert session_configuration({"ZENOH_SESSION_CONFIG_URI": str(file)}).get_json("connect/endpoints") == '["tcp/127.0.0.1:9"]'
    with pytest.raises(UsageError, match="ZENOH_SESSION_CONFIG_URI cannot be read: No such file"):
        session_configuration({"ZENOH_SESSION_CONFIG_URI": str(tmp_path / "none.json5")})
    with pytest.raises(UsageError, match=r"ZENOH_CONFIG_OVERRIDE has 'nonsense=1': .*unknown key"):
        session_configuration({"ZENOH_CONFIG_OVERRIDE": "nonsense=1"})


def test_a_node_that_meets_nobody_says_so_and_joins_a_router_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    endpoints = f'connect/endpoints=["tcp/127.0.0.1:{port}"];listen/endpoints=["tcp/127.0.0.1:0"]'
    monkeypatch.setenv("ZENOH_CONFIG_OVERRIDE", f"{endpoints};connect/retry={{period_init_ms: 50}}")  # 1 s by default
    alone = ZenohNode(NodeName("/eye"), Topics(None, None, "/eye/prompt", "/eye/answer"), DOMAIN)
    assert alone.notice.startswith("No Zenoh router is there yet.")
    router = ZenohPeer(port, DOMAIN)
    router.wait(lambda: len(router.tokens()) == 4)
    router.wait(lambda: router.answers != [], again=lambda: alone.answer("late"))
    alone.close()
    router.close()


def test_what_zenoh_cannot_do_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZENOH_CONFIG_OVERRIDE", 'listen/endpoints=["tcp/192.0.2.1:1"]')
    with pytest.raises(EdgePruneError, match="Zenoh does not start: Can not create a new TCP listener"):
        ZenohNode(NodeName("/eye"), Topics(None, None, "/eye/prompt", "/eye/answer"), 0)
