"""Run the DDS node until a signal stops it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from edgeprune.bundle.signing import TrustedKeys
from edgeprune.runtime.ros2.answerer import OutputCallbacks, QuestionWorker
from edgeprune.runtime.ros2.node import InputCallbacks, Node, NodeName, Topics, domain_id


def serve(
    bundle: str | os.PathLike[str],
    *,
    node: str = "edgeprune",
    image_topic: str | None = None,
    compressed_topic: str | None = None,
    prompt_topic: str = "~/prompt",
    answer_topic: str = "~/answer",
    domain: int | None = None,
    threads: int | None = None,
    provider: str = "cpu",
    check: str = "full",
    require_signature: TrustedKeys = (),
    announce: Callable[[str], None] = lambda line: None,
    **answering: Any,
) -> None:
    """Answer questions over DDS until SIGINT or SIGTERM. Must be called from the main thread.

    Topics are ROS names. Without an image topic, the node subscribes to "image" and "image/compressed"; otherwise only to those
    given. `check` and `require_signature`: as in `load`. `answering`: keyword arguments of QuestionWorker. `announce`: called with
    status lines. Raises the errors of `load`.
    """
    name = NodeName.parse(node)
    topics = _topics(name, image_topic, compressed_topic, prompt_topic, answer_topic)
    number = domain_id(domain)
    stop = threading.Event()
    with _stopped_by_signals(stop):
        dds = Node(name, topics, number)

        def load(on_phase: Callable[[str], None]) -> Any:
            from edgeprune.runtime.api.loading import load as load_bundle

            opening: dict[str, Any] = {"threads": threads, "provider": provider, "check": check}
            model = load_bundle(bundle, **opening, require_signature=require_signature, warm_up=True, on_phase=on_phase)
            announce("ready")
            return model

        outputs = OutputCallbacks(dds.piece, dds.answer, dds.report)
        answerer = QuestionWorker(load, outputs, on_failure=stop.set, **answering)
        try:
            dds.listen(
                InputCallbacks(
                    answerer.image, answerer.compressed, answerer.prompt, answerer.report_error, answerer.publish_diagnostics
                )
            )
            announce(_summary(name, topics, number))
            answerer.start()
            stop.wait()
        finally:
            answerer.close()
            dds.close()
    if answerer.failure is not None:
        raise answerer.failure


def _topics(name: NodeName, image: str | None, compressed: str | None, prompt: str, answer: str) -> Topics:
    if image is None and compressed is None:
        image, compressed = "image", "image/compressed"
    return Topics(
        image=None if image is None else name.topic(image),
        compressed=None if compressed is None else name.topic(compressed),
        prompt=name.topic(prompt),
        answer=name.topic(answer),
    )


def _summary(name: NodeName, topics: Topics, domain: int) -> str:
    images = " and ".join(topic for topic in (topics.image, topics.compressed) if topic)
    return f"{name.full} in domain {domain}: images on {images}, questions on {topics.prompt}, answers on {topics.answer}"


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
