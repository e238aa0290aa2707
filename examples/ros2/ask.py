"""Ask a running node about one image over DDS, and print the answer as it comes. Needs no ROS.

python ask.py table.png "What colour is the cube?" [--node /edgeprune] [--topic /image] [--compressed] [--domain N]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from cyclonedds.core import Policy, Qos
from cyclonedds.domain import DomainParticipant
from cyclonedds.pub import DataWriter
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic
from cyclonedds.util import duration
from PIL import Image as Pictures

from edgeprune.runtime.ros2.dds import dds_topic
from edgeprune.runtime.ros2.messages import CompressedImage, Image, String
from edgeprune.runtime.ros2.node import NodeName, domain_id

QOS = Qos(Policy.Reliability.Reliable(duration(seconds=1)), Policy.History.KeepLast(100))


def main() -> None:
    """Publish the image and the question, then print pieces until the empty one that ends an answer."""
    options = _options()
    name = NodeName.parse(options.node)
    participant = DomainParticipant(domain_id(options.domain))
    image = _packed(options.image) if options.compressed else _raw(options.image)
    topic = name.topic(options.topic) + ("/compressed" if options.compressed else "")
    camera = DataWriter(participant, Topic(participant, dds_topic(topic), type(image)), qos=QOS)
    asker = DataWriter(participant, Topic(participant, dds_topic(name.topic("~/prompt")), String), qos=QOS)
    pieces = DataReader(participant, Topic(participant, dds_topic(name.topic("~/answer/pieces")), String), qos=QOS)
    _meet(camera, asker, pieces, options.timeout)
    camera.write(image)
    asker.write(String(options.prompt))
    said = ""
    for piece in pieces.take_iter(timeout=duration(seconds=options.timeout)):
        if not piece.data:
            break
        print(piece.data, end="", flush=True)
        said += piece.data
    if not said:
        raise SystemExit("No answer came: /diagnostics says why.")
    print()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a running node about one image.")
    parser.add_argument("image", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--node", default="edgeprune")
    parser.add_argument("--topic", default="image")
    parser.add_argument("--compressed", action="store_true", help="send the file as it is")
    parser.add_argument("--domain", type=int)
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds")
    return parser.parse_args()


def _raw(path: Path) -> Image:
    pixels = np.asarray(Pictures.open(path).convert("RGB"))
    height, width, _ = pixels.shape
    return Image(height=height, width=width, encoding="rgb8", step=3 * width, data=pixels.tobytes())


def _packed(path: Path) -> CompressedImage:
    return CompressedImage(format=path.suffix[1:], data=path.read_bytes())


def _meet(camera: Any, asker: Any, pieces: Any, timeout: float) -> None:
    # What is written before the node has been found is lost.
    end = time.monotonic() + timeout
    while not (camera.get_matched_subscriptions() and asker.get_matched_subscriptions() and pieces.get_matched_publications()):
        if time.monotonic() > end:
            raise SystemExit("There is no such node in this domain.")
        time.sleep(0.05)
    time.sleep(0.2)  # the node's side finds us a moment later


if __name__ == "__main__":
    main()
