"""Real DDS between processes: the command in one, a camera and someone who asks in another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cyclonedds", reason="cyclonedds is not installed")

from loopback import CYCLONEDDS
from PIL import Image as Pictures
from ros2_peer import WAIT, Peer

from edgeprune.bundle import Bundle
from edgeprune.runtime import Runtime, load
from edgeprune.runtime.media.frames import NV12
from edgeprune.runtime.ros2.messages import Clock, CompressedImage, Header, Image, String, Time

PROMPT = "What colour is the cube?"
TOKENS = 100
DOMAIN = 1 + os.getpid() % 100
ENVIRONMENT = os.environ | {"CYCLONEDDS_URI": CYCLONEDDS, "ROS_DOMAIN_ID": str(DOMAIN), "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-c", "from edgeprune.cli import main; main()", "ros2"]


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def node(tiny_bundle: Bundle) -> Iterator[subprocess.Popen[str]]:
    options = ["--node", "/robot/eye", "--max-tokens", TOKENS, "--frame-timeout", 0.5, "--threads", 1, "--use-sim-time"]
    process = start(tiny_bundle.path, *options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def peer(node: subprocess.Popen[str]) -> Iterator[Peer]:
    peer = Peer(DOMAIN, "/robot/eye", "/robot")
    try:
        peer.wait_for_value("phase", "ready")
        blank = np.zeros((84, 112), np.uint8)
        # Images are not sent again to a reader that is found later than it finds the writer.
        peer.wait(lambda: peer.counted("frames received") > 0, again=lambda: peer.send(message(blank, "mono8")))
        peer.wait(lambda: peer.counted("frames refused") > 0, again=lambda: peer.send(CompressedImage(data=b"x")))
        asked_about(peer, message(blank, "mono8"))
        yield peer
    finally:
        peer.close()


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Bundle) -> Runtime:
    return load(tiny_bundle.path, threads=1)


def message(rows: np.ndarray, encoding: str, padding: int = 0, height: int = 84) -> Image:
    flat = np.pad(rows.reshape(len(rows), -1), ((0, 0), (0, padding)), constant_values=9)
    return Image(Header(Time(5, 6), "camera"), height, 112, encoding, 0, flat.shape[1], flat.tobytes())


def asked_about(peer: Peer, image: Any, prompt: str = PROMPT) -> str:
    """Publish an image, then a question, and return the answer."""
    before = len(peer.answers)
    peer.pieces.clear()
    peer.send(image)
    peer.send(String(prompt))
    peer.wait(lambda: len(peer.answers) > before and bool(peer.pieces) and peer.pieces[-1] == "")
    assert "".join(peer.pieces) == peer.answers[-1]
    return peer.answers[-1]


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (84, 112, 3), np.uint8)


def direct(runtime: Runtime, image: Any, prompt: str = PROMPT) -> str:
    return runtime.generate(image, prompt, max_tokens=TOKENS).text


def test_images_of_every_encoding_give_the_answer_of_a_direct_call(peer: Peer, runtime: Runtime) -> None:
    pixels = noise(1)
    expected = direct(runtime, pixels)
    assert expected != direct(runtime, noise(2))
    alpha = noise(4)[..., :1]
    on_white = direct(runtime, np.concatenate([pixels, alpha], axis=2))
    assert asked_about(peer, message(pixels, "rgb8")) == expected
    assert asked_about(peer, message(pixels[..., ::-1], "bgr8", padding=16)) == expected
    assert asked_about(peer, message(np.concatenate([pixels, alpha], axis=2), "rgba8")) == on_white
    assert asked_about(peer, message(np.concatenate([pixels[..., ::-1], alpha], axis=2), "bgra8")) == on_white
    deep = np.frombuffer((pixels[..., 0].astype("<u2") * 257).tobytes(), np.uint8).reshape(84, 224)
    assert asked_about(peer, message(deep, "mono16", padding=3)) == direct(runtime, pixels[..., 0])
    assert asked_about(peer, message(pixels[..., 0], "mono8", padding=3)) == direct(runtime, pixels[..., 0])
    planes = np.concatenate([pixels[..., 0], pixels[:42, :, 1]])
    frame = NV12(planes.tobytes(), 112, 84)
    assert asked_about(peer, message(planes, "nv12", padding=16)) == direct(runtime, frame)


@pytest.mark.parametrize("codec", ["PNG", "JPEG"])
def test_compressed_images_give_the_answer_of_a_direct_call(peer: Peer, runtime: Runtime, codec: str) -> None:
    file = BytesIO()
    Pictures.fromarray(noise(3)).save(file, codec)
    packed = CompressedImage(Header(Time(5, 6), "camera"), f"rgb8; {codec.lower()} compressed", file.getvalue())
    assert asked_about(peer, packed) == direct(runtime, Pictures.open(file))


def test_the_newest_frame_is_asked_about_and_the_others_are_dropped(peer: Peer, runtime: Runtime) -> None:
    peer.wait_for_value("phase", "ready")
    received, dropped = peer.counted("frames received"), peer.counted("frames dropped")
    for seed in range(10, 15):
        peer.send(message(noise(seed), "rgb8"))
    peer.wait_for_value("frames received", received + 5)
    answers = len(peer.answers)
    peer.send(String(PROMPT))
    peer.wait(lambda: len(peer.answers) > answers)
    assert peer.answers[-1] == direct(runtime, noise(14))
    peer.wait_for_value("frames dropped", dropped + 4)
    values = peer.values
    assert float(values["frame age ms"]) > 0
    assert float(values["ttft ms"]) > 0
    assert values["visual tokens"] == "12"
    assert 0 < float(values["kept tokens"]) < 12
    assert values["phase"] == "ready"
    assert peer.statuses[-1].name == "robot/eye: answers"


def test_a_question_without_a_new_image_goes_to_the_diagnostics(peer: Peer, runtime: Runtime) -> None:
    asked_about(peer, message(noise(20), "rgb8"))
    failed, answers = peer.counted("questions failed"), len(peer.answers)
    peer.send(String(PROMPT))
    peer.wait_for_value("questions failed", failed + 1)
    assert "No new frame came within 0.5 s." in peer.statuses[-1].message
    assert peer.statuses[-1].level == 2
    assert len(peer.answers) == answers
    assert asked_about(peer, message(noise(1), "rgb8")) == direct(runtime, noise(1))


def test_a_new_question_ends_the_one_being_answered(peer: Peer, runtime: Runtime) -> None:
    peer.wait_for_value("phase", "ready")
    cancelled, answers = peer.counted("questions cancelled"), len(peer.answers)
    peer.pieces.clear()
    peer.send(message(noise(30), "rgb8"))
    peer.send(String(PROMPT))
    peer.wait(lambda: bool(peer.pieces))
    peer.send(message(noise(31), "rgb8"))
    peer.send(String("And what shape?"))
    peer.wait_for_value("questions cancelled", cancelled + 1)
    peer.wait(lambda: len(peer.answers) > answers)
    assert peer.answers[answers:] == [direct(runtime, noise(31), "And what shape?")]


def test_messages_that_cannot_be_read_do_not_stop_the_node(peer: Peer, runtime: Runtime) -> None:
    good = message(noise(40), "rgb8")
    refused, failed = peer.counted("frames refused"), peer.counted("questions failed")
    bad: list[dict[str, Any]] = [
        {"step": 3},
        {"height": 85},
        {"encoding": "16UC1"},
        {"width": 0},
        {"data": b""},
        {"encoding": "nv12"},
    ]
    for number, changes in enumerate(bad, start=1):  # one by one: the node takes the newest, and may never see the others
        peer.send(Image(**(vars(good) | changes)))
        peer.wait_for_value("frames refused", refused + number)
    assert peer.statuses[-1].level == 1
    broken = String()
    broken.serialize = lambda **_: bytes.fromhex("00010000 03000000 fffe00")
    peer.pieces.clear()
    peer.send(broken)  # no UTF-8
    peer.wait_for_value("questions failed", failed + 1)
    assert peer.values["last error"] == "A message on /robot/eye/prompt cannot be read: it is not UTF-8 text."
    peer.wait(lambda: peer.pieces == [""])  # whoever asked knows that nothing comes
    assert asked_about(peer, good) == direct(runtime, noise(40))
    peer.wait(lambda: peer.statuses[-1].level == 0)


def test_a_camera_of_best_effort_is_heard_and_such_a_question_is_reported(peer: Peer) -> None:
    received, unheard = peer.counted("frames received"), peer.counted("publishers unheard")
    film, ask = peer.send_best_effort("/robot/image"), peer.send_best_effort("/robot/eye/prompt")
    good = message(noise(1), "rgb8")
    peer.wait(lambda: peer.counted("frames received") > received, again=lambda: film(good))
    ask(String(PROMPT))
    peer.wait_for_value("publishers unheard", unheard + 1)
    assert peer.values["last error"] == (
        "A publisher on /robot/eye/prompt is not heard: its QoS (reliability) does not match. Publish it as reliable."
    )


def test_the_age_of_a_frame_counts_on_the_clock_of_the_simulation(peer: Peer) -> None:
    still = message(noise(1), "rgb8")
    still.header.stamp = Time(98, 0)

    def ask() -> None:
        peer.send(Clock(Time(100, 0)))
        asked_about(peer, still)

    peer.wait(lambda: float(peer.values["frame age ms"] or 0) >= 2000, again=ask)  # once the node hears the clock
    assert float(peer.values["frame age ms"]) < 2000 + 1000 * WAIT


def test_it_stops_when_asked_to(peer: Peer, node: subprocess.Popen[str]) -> None:
    peer.send(message(noise(1), "rgb8"))
    peer.send(String(PROMPT))
    node.send_signal(signal.SIGTERM)
    _, errors = node.communicate(timeout=WAIT)
    assert node.returncode == 0, errors
    lines = errors.splitlines()
    images = "/robot/image and /robot/image/compressed"
    assert lines[0] == (
        f"/robot/eye in domain {DOMAIN} over dds: images on {images}, questions on /robot/eye/prompt, answers on /robot/eye/answer"
    )
    assert lines[1:] == ["ready"]


def test_interrupting_it_while_it_loads_is_no_error(tiny_bundle: Bundle) -> None:
    process = start(tiny_bundle.path, "--image-topic", "/camera/image_raw")
    assert process.stderr is not None
    assert "images on /camera/image_raw, questions on /edgeprune/prompt" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_a_failure_of_the_thread_that_hears_ends_the_process(tiny_bundle: Bundle) -> None:
    code = (
        "import sys; from edgeprune.runtime.ros2 import dds; from edgeprune.runtime.ros2.service import serve\n"
        "def fail(*_): raise RuntimeError('a bug')\n"
        "dds._Source.take = fail\n"
        "serve(sys.argv[1])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(tiny_bundle.path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=WAIT
    )
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == "RuntimeError: a bug"


def test_a_bundle_that_is_none_is_one_line(tmp_path: Path) -> None:
    process = start(tmp_path)
    _, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in errors


def test_a_topic_that_is_none_is_a_usage_error(tmp_path: Path) -> None:
    process = start(tmp_path, "--prompt-topic", "a b")
    _, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 2
    assert errors == "Error: 'a b' is no topic. For example: image, /camera/image_raw or ~/answer.\n"
