"""Ask a running node about one image over DDS or Zenoh, and print the answer as it comes. Needs no ROS.

python ask.py table.png "What colour is the cube?" [--node /edgeprune] [--topic /image] [--compressed] [--domain N]
              [--transport dds|zenoh] [--router]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from PIL import Image as Pictures

from edgeprune.runtime.ros2.node import NodeName, domain_id, transport_of

STRING, TIME, HEADER = "std_msgs/msg/String", "builtin_interfaces/msg/Time", "std_msgs/msg/Header"
RAW, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"


def main() -> None:
    """Publish the image and the question, then print pieces until the empty one that ends an answer."""
    options = _options()
    name = NodeName.parse(options.node)
    kind = COMPRESSED if options.compressed else RAW
    image, prompt = name.topic(options.topic) + ("/compressed" if options.compressed else ""), name.topic("~/prompt")
    topics = {image: kind, prompt: STRING}
    make, send, pieces = _transport(options)(topics, name.topic("~/answer/pieces"), domain_id(options.domain), options)
    send(image, _image(make, kind, options.image))
    send(prompt, make(STRING, options.prompt))
    said = ""
    for piece in pieces():
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
    parser.add_argument("--transport", choices=("dds", "zenoh"), help="as of `edgeprune ros2`")
    parser.add_argument("--router", action="store_true", help="Zenoh: be the router too, where ROS's does not run")
    return parser.parse_args()


def _image(make: Callable[..., Any], kind: str, path: Path) -> Any:
    header = make(HEADER, make(TIME, 0, 0), "")
    if kind == COMPRESSED:
        return make(kind, header, path.suffix[1:], path.read_bytes())
    pixels = np.asarray(Pictures.open(path).convert("RGB"))
    height, width, _ = pixels.shape
    return make(kind, header, height, width, "rgb8", 0, 3 * width, pixels.tobytes())


# A transport joins a domain and waits until a node hears its topics. It returns how to make a message of its type and fields, how
# to send one on a topic, and the messages that come on the topic `heard`.
Joined = tuple[Callable[..., Any], Callable[[str, Any], None], Callable[[], Iterator[Any]]]


def _transport(options: argparse.Namespace) -> Callable[[dict[str, str], str, int, argparse.Namespace], Joined]:
    return _zenoh if transport_of(options.transport) == "zenoh" else _dds


def _dds(topics: dict[str, str], heard: str, domain: int, options: argparse.Namespace) -> Joined:
    from cyclonedds.core import Policy, Qos
    from cyclonedds.domain import DomainParticipant
    from cyclonedds.pub import DataWriter
    from cyclonedds.sub import DataReader
    from cyclonedds.topic import Topic
    from cyclonedds.util import duration

    from edgeprune.runtime.ros2 import messages
    from edgeprune.runtime.ros2.dds import dds_topic

    def of(kind: str) -> Any:
        return getattr(messages, kind.rpartition("/")[2])

    qos = Qos(Policy.Reliability.Reliable(duration(seconds=1)), Policy.History.KeepLast(100))
    member = DomainParticipant(domain)
    writers = {topic: DataWriter(member, Topic(member, dds_topic(topic), of(kind)), qos=qos) for topic, kind in topics.items()}
    reader = DataReader(member, Topic(member, dds_topic(heard), messages.String), qos=qos)
    _wait(
        lambda: reader.get_matched_publications() and all(each.get_matched_subscriptions() for each in writers.values()),
        options.timeout,
    )
    return (
        lambda kind, *fields: of(kind)(*fields),
        lambda topic, message: writers[topic].write(message),
        lambda: reader.take_iter(timeout=duration(seconds=options.timeout)),
    )


def _zenoh(topics: dict[str, str], heard: str, domain: int, options: argparse.Namespace) -> Joined:
    import zenoh

    from edgeprune.runtime.ros2.definitions import decode, encode, message
    from edgeprune.runtime.ros2.rmw_zenoh import Wire, attachment, gid, has_type_hashes
    from edgeprune.runtime.ros2.zenoh import session_configuration

    config = session_configuration()
    if options.router:  # where the others look for one
        place = config.get_json("connect/endpoints")
        for key, value in {"mode": '"router"', "connect/endpoints": "[]", "listen/endpoints": place}.items():
            config.insert_json5(key, value)
    session, arrived = zenoh.open(config), SimpleQueue[Any]()
    wire = Wire(domain, NodeName.parse("ask"), str(session.zid()), has_type_hashes())
    hearing = session.declare_subscriber(
        wire.topic_of_any_hash(heard, STRING), zenoh.handlers.Callback(arrived.put, indirect=False)
    )
    publishers = {
        topic: session.declare_publisher(wire.topic(topic, kind), congestion_control=zenoh.CongestionControl.BLOCK)
        for topic, kind in topics.items()
    }
    _wait(lambda: all(publisher.matching_status.matching for publisher in publishers.values()), options.timeout)

    def make(kind: str, *fields: Any) -> Any:
        return message(kind, *(np.frombuffer(each, np.uint8) if isinstance(each, bytes) else each for each in fields))

    def send(topic: str, content: Any) -> None:
        # Each topic has one message, so that every one is its publisher's first.
        publishers[topic].put(encode(content), attachment=attachment(1, time.time_ns(), gid(topic)))

    def pieces() -> Iterator[Any]:
        try:
            while not session.is_closed():  # it ends with the last reference to it
                yield decode(STRING, arrived.get(timeout=options.timeout).payload.to_bytes())
        except Empty:
            return
        finally:
            hearing.undeclare()

    return make, send, pieces


def _wait(met: Callable[[], Any], timeout: float) -> None:
    # What is written before the node has been found is lost.
    end = time.monotonic() + timeout
    while not met():
        if time.monotonic() > end:
            raise SystemExit("There is no such node in this domain.")
        time.sleep(0.05)
    time.sleep(0.2)  # the node's side finds us a moment later


if __name__ == "__main__":
    main()
