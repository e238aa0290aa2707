"""A clock that is set forward or back while answers are made: what they say of time does not change."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.runtime import Feed, Receipt, Runtime, load
from edgeprune.runtime.media.feed import FeedTimeout

HOURS = 6 * 3600.0
PROMPT = "What colour is the cube?"


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Bundle) -> Runtime:
    return load(tiny_bundle.path, threads=1)


@pytest.fixture(params=[HOURS, -HOURS], ids=["forward", "back"])
def jumping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Have the system's clock jump each time that somebody reads it; return the list of readings."""
    right, right_ns, readings = time.time, time.time_ns, list[int]()

    def jumped() -> float:
        readings.append(1)
        return float(request.param) * len(readings)

    monkeypatch.setattr(time, "time", lambda: right() + jumped())
    monkeypatch.setattr(time, "time_ns", lambda: right_ns() + int(1e9 * jumped()))
    yield readings


def plausible(receipt: Receipt) -> bool:
    times = receipt.times
    parts = [times.preprocess_ms, times.vision_ms, times.select_ms, times.prefill_ms, *times.decode_ms]
    return all(0 <= part < 60_000 for part in parts)


def test_an_answer(jumping: list[int], runtime: Runtime, tiny_image: Image.Image) -> None:
    receipt = runtime.generate(tiny_image, PROMPT, max_tokens=8).receipt
    assert plausible(receipt) and receipt.finish_reason in ("end", "length")
    assert jumping, "the clock was read"


def test_a_deadline_is_kept_and_no_other_is_made_up(jumping: list[int], runtime: Runtime, tiny_image: Image.Image) -> None:
    assert runtime.generate(tiny_image, PROMPT, max_tokens=8, deadline_ms=60_000).receipt.finish_reason in ("end", "length")
    late = runtime.generate(tiny_image, PROMPT, max_tokens=400, deadline_ms=1).receipt
    assert late.finish_reason == "deadline"


def test_the_age_of_a_frame(jumping: list[int], runtime: Runtime, tiny_image: Image.Image) -> None:
    feed = Feed()
    feed.put(tiny_image)
    stream = runtime.ask_latest(feed, PROMPT, timeout=10, max_tokens=2)
    list(stream)
    assert stream.receipt.frame_age_ms is not None and 0 <= stream.receipt.frame_age_ms < 60_000


@pytest.mark.parametrize("epoch", [0.0, 1.7e9], ids=["simulation", "since 1970"])
def test_the_age_of_a_frame_on_a_clock_of_its_own(epoch: float, runtime: Runtime, tiny_image: Image.Image) -> None:
    started = time.monotonic()
    feed = Feed(clock=lambda: epoch + 10 + time.monotonic() - started)
    feed.put(tiny_image, captured=epoch + 9)
    stream = runtime.ask_latest(feed, PROMPT, timeout=10, max_tokens=2)
    list(stream)
    assert stream.receipt.frame_age_ms is not None and 1000 <= stream.receipt.frame_age_ms < 60_000
    assert stream.receipt.captured is not None and abs(stream.receipt.captured - (started - 1)) < 0.5


def test_a_feed_waits_as_long_as_it_was_told(jumping: list[int]) -> None:
    started = time.monotonic()
    with pytest.raises(FeedTimeout):
        Feed().take(timeout=0.05)
    assert 0.04 < time.monotonic() - started < 10


def test_the_stages_of_a_span_end_after_they_began(jumping: list[int], runtime: Runtime, tiny_image: Image.Image) -> None:
    stages = runtime.generate(tiny_image, PROMPT, max_tokens=8).receipt.times.stages
    assert stages
    lasted = {stage.name: stage.ended_ns - stage.began_ns for stage in stages if stage.name != "decode"}
    assert all(0 <= ns < 60 * 10**9 for ns in lasted.values()), lasted
