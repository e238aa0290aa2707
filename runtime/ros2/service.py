"""Run the node until a signal stops it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from edgeprune.bundle.signing import TrustedKeys
from edgeprune.runtime.ros2.answerer import OnPhase, OutputCallbacks, QuestionWorker
from edgeprune.runtime.ros2.node import InputCallbacks, NodeName, SimulatedTime, Topics, domain_id, open_node, transport_of

Announce = Callable[[str], None]


def serve(
    bundle: str | os.PathLike[str],
    *,
    node: str = "edgeprune",
    image_topic: str | None = None,
    compressed_topic: str | None = None,
    prompt_topic: str = "~/prompt",
    answer_topic: str = "~/answer",
    transport: str | None = None,
    domain: int | None = None,
    use_sim_time: bool = False,
    threads: int | None = None,
    provider: str = "cpu",
    check: str = "full",
    require_signature: TrustedKeys = (),
    trust: TrustedKeys = (),
    announce: Announce = lambda line: None,
    **answering: Any,
) -> None:
    """Answer questions over ROS 2 until SIGINT or SIGTERM. Must be called from the main thread.

    Topics are ROS names. Without an image topic, the node subscribes to "image" and "image/compressed"; otherwise only to those
    given. `transport`: "dds", "zenoh", or None for the one of RMW_IMPLEMENTATION. `use_sim_time`: header stamps count on /clock, as
    ROS's parameter of that name says. `check`, `require_signature` and `trust`: as in `load`. `answering`: keyword arguments of
    QuestionWorker. `announce`: called with status lines. Raises the errors of `load`, and what ended a thread of the node.
    """
    transport = transport_of(transport)
    name = NodeName.parse(node)
    topics = _topics(name, image_topic, compressed_topic, prompt_topic, answer_topic)
    number, stop = domain_id(domain), threading.Event()
    opening = {"threads": threads, "provider": provider, "check": check, "require_signature": require_signature, "trust": trust}
    clock = SimulatedTime() if use_sim_time else time.time
    with _stopped_by_signals(stop), closing(open_node(transport, name, topics, number)) as opened:
        outputs = OutputCallbacks(opened.piece, opened.answer, opened.report)
        worker = QuestionWorker(_loader(bundle, opening, announce), outputs, on_failure=stop.set, clock=clock, **answering)
        with closing(worker):
            opened.listen(_inputs(worker, stop, clock.set if isinstance(clock, SimulatedTime) else None))
            announce(_summary(name, topics, transport, number))
            if opened.notice:
                announce(opened.notice)
            worker.start()
            stop.wait()
    for failure in (worker.failure, opened.failure):
        if failure is not None:
            raise failure


def _loader(bundle: str | os.PathLike[str], opening: dict[str, Any], announce: Announce) -> Callable[[OnPhase], Any]:
    def load(on_phase: OnPhase) -> Any:
        from edgeprune.runtime.api.loading import load as load_bundle

        model = load_bundle(bundle, warm_up=True, on_phase=on_phase, **opening)
        announce("ready")
        return model

    return load


def _inputs(worker: QuestionWorker, stop: threading.Event, set_clock: Callable[[float], None] | None) -> InputCallbacks:
    return InputCallbacks(
        image=worker.image,
        compressed=worker.compressed,
        prompt=worker.prompt,
        report_error=worker.report_error,
        report_unheard=worker.report_unheard,
        publish_diagnostics=worker.publish_diagnostics,
        on_failure=stop.set,
        set_clock=set_clock,
    )


def _topics(name: NodeName, image: str | None, compressed: str | None, prompt: str, answer: str) -> Topics:
    if image is None and compressed is None:
        image, compressed = "image", "image/compressed"
    return Topics(
        image=None if image is None else name.topic(image),
        compressed=None if compressed is None else name.topic(compressed),
        prompt=name.topic(prompt),
        answer=name.topic(answer),
    )


def _summary(name: NodeName, topics: Topics, transport: str, domain: int) -> str:
    images = " and ".join(topic for topic in (topics.image, topics.compressed) if topic)
    heard = f"images on {images}, questions on {topics.prompt}"
    return f"{name.full} in domain {domain} over {transport}: {heard}, answers on {topics.answer}"


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
