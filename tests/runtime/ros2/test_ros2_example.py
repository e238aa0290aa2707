"""The ROS package of examples/ros2 on a stand-in for rclpy, and the script that asks over DDS and Zenoh."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from array import array
from collections.abc import Callable
from importlib import util
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import ros2_fake_rclpy as fake
from loopback import CYCLONEDDS, free_port, zenoh_override
from PIL import Image as Pictures
from repository import ROOT

from edgeprune.bundle import Bundle
from edgeprune.errors import BundleError
from edgeprune.runtime import Runtime, load

EXAMPLE = ROOT / "examples" / "ros2"
PACKAGE = EXAMPLE / "edgeprune_ros2"
PROMPT = "What colour is the cube?"
Script = Callable[[Any], None]


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Bundle) -> Runtime:
    return load(tiny_bundle.path, threads=1)


def node_module(monkeypatch: pytest.MonkeyPatch, script: Script) -> ModuleType:
    for name, module in fake.modules(script).items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = util.spec_from_file_location("edgeprune_ros2_node", PACKAGE / "edgeprune_ros2" / "node.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(monkeypatch: pytest.MonkeyPatch, script: Script, **parameters: Any) -> None:
    """Run the node's main, with `script` in the place of rclpy.spin."""
    monkeypatch.setattr(fake.Node, "overrides", parameters)
    node_module(monkeypatch, script).main()


def values(message: Any) -> dict[str, str]:
    return {item.key: item.value for item in message.status[0].values}


def test_the_node_answers_as_a_direct_call_does(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle, runtime: Runtime) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (84, 112, 3), np.uint8)
    file = BytesIO()
    Pictures.fromarray(pixels).save(file, "PNG")
    image = fake.Image(84, 112, "bgr8", 336, array("B", pixels[..., ::-1].tobytes()))
    seen: list[Any] = []

    def script(node: Any) -> None:
        seen.append(node)
        hear = {topic: callback for topic, (_, callback, _) in node.subscriptions.items()}
        answers, diagnostics = node.publishers["~/answer"][1], node.publishers["/diagnostics"][1]
        diagnostics.wait_for(lambda messages: bool(messages) and values(messages[-1])["phase"] == "ready")
        sent = {"image": image, "image/compressed": fake.CompressedImage("png", file.getvalue())}
        for count, (topic, message) in enumerate(sent.items(), start=1):
            hear[topic](message)
            hear["~/prompt"](fake.String(PROMPT))
            answers.wait_for(lambda messages, wanted=count: len(messages) == wanted)
            diagnostics.wait_for(lambda messages, wanted=str(count): values(messages[-1])["answers"] == wanted)
        raise fake.ExternalShutdownException

    run(monkeypatch, script, bundle=str(tiny_bundle.path), threads=1, max_tokens=30)
    node = seen[0]
    expected = runtime.generate(pixels, PROMPT, max_tokens=30).text
    assert [message.data for message in node.publishers["~/answer"][1].messages] == [expected, expected]
    pieces = [message.data for message in node.publishers["~/answer/pieces"][1].messages]
    assert "".join(pieces) == 2 * expected
    assert pieces.count("") == 2
    report = node.publishers["/diagnostics"][1].messages[-1]
    assert (report.status[0].level, report.status[0].name, report.header.stamp) == (b"\0", "edgeprune: answers", "now")
    assert node.destroyed


def test_topics_and_types_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle) -> None:
    def script(node: Any) -> None:
        heard = {topic: (kind, qos) for topic, (kind, _, qos) in node.subscriptions.items()}
        assert heard == {
            "image": (fake.Image, fake.SENSOR_DATA),
            "image/compressed": (fake.CompressedImage, fake.SENSOR_DATA),
            "~/prompt": (fake.String, 100),
        }
        assert {topic: kind for topic, (kind, _, _) in node.publishers.items()} == {
            "~/answer": fake.String,
            "~/answer/pieces": fake.String,
            "/diagnostics": fake.DiagnosticArray,
        }
        assert [period for period, _ in node.timers] == [1.0]
        raise KeyboardInterrupt

    run(monkeypatch, script, bundle=str(tiny_bundle.path))


def test_a_bundle_that_is_none_ends_the_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def script(node: Any) -> None:
        node.answerer._thread.join(fake.WAIT)
        for _, callback in node.timers:
            callback()

    with pytest.raises(BundleError):
        run(monkeypatch, script, bundle=str(tmp_path))


def test_the_package_installs_every_file_that_it_names() -> None:
    root = ElementTree.parse(PACKAGE / "package.xml").getroot()
    name = root.findtext("name")
    assert name == "edgeprune_ros2"
    depends = {element.text for element in root.iter("exec_depend")}
    imported = set()
    for path in (PACKAGE / "edgeprune_ros2" / "node.py", PACKAGE / "launch" / "answers_launch.py"):
        tree = ast.parse(path.read_text())
        imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert imported - {"__future__", "typing", "edgeprune", "launch"} <= depends
    setup = (PACKAGE / "setup.py").read_text()
    for file in re.findall(r'\["([^"\[]+/[^"]+|package\.xml)"\]', setup):
        assert (PACKAGE / file).is_file(), file
    assert "answers_launch.py" in setup


@pytest.mark.parametrize(
    ("package", "flags"),
    [
        ("cyclonedds", ["--transport", "dds"]),
        ("cyclonedds", ["--transport", "dds", "--compressed"]),
        ("zenoh", ["--transport", "zenoh", "--router"]),
    ],
    ids=["dds", "dds, compressed", "zenoh"],
)
def test_the_script_asks(tiny_bundle: Bundle, runtime: Runtime, tmp_path: Path, package: str, flags: list[str]) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    pixels = np.random.default_rng(1).integers(0, 256, (84, 112, 3), np.uint8)
    Pictures.fromarray(pixels).save(tmp_path / "table.png")
    environment = os.environ | {
        "CYCLONEDDS_URI": CYCLONEDDS,
        "ZENOH_CONFIG_OVERRIDE": zenoh_override(free_port()),
        "ROS_DOMAIN_ID": str(1 + os.getpid() % 100),
        "OMP_NUM_THREADS": "1",
    }
    name = f"/example_{os.getpid()}/eye"
    command = [sys.executable, "-c", "from edgeprune.cli import main; main()", "ros2", str(tiny_bundle.path), "--node", name]
    command += ["--transport", flags[1], "--max-tokens", "30"]
    node = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        ask = [sys.executable, str(EXAMPLE / "ask.py"), str(tmp_path / "table.png"), PROMPT, "--node", name, "--timeout", "15"]
        result = subprocess.run([*ask, *flags], env=environment, capture_output=True, text=True, timeout=40)
        assert result.returncode == 0, result.stderr
        assert result.stdout == runtime.generate(pixels, PROMPT, max_tokens=30).text + "\n"
    finally:
        node.terminate()
        node.communicate(timeout=20)
