"""Windows of frames for video: as far apart as asked, always with the newest, and in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
from test_runtime_feed import Clock, filled, names

from edgeprune.runtime.media.feed import Feed, FeedTimeout


def test_a_window_without_a_rate_is_the_newest_frames() -> None:
    feed = Feed(3)
    feed.put("a")
    feed.put("b")
    with pytest.raises(FeedTimeout, match="window of 3 frames was not full within 0 s"):
        feed.take(0)
    feed.put("c")
    assert names(feed.take(0)) == ["a", "b", "c"]
    feed.put("d")
    shot = feed.take(0)
    assert (names(shot), shot.picture, shot.dropped) == (["b", "c", "d"], ["b", "c", "d"], 0)


@pytest.mark.parametrize("rate", [2.1, 3.7, 5, 7, 10, 15, 24, 29.97, 30, 60, 120])
@pytest.mark.parametrize(("window", "fps"), [(2, 1.0), (4, 2.0), (8, 1.0), (3, 0.4)])
def test_frames_of_a_window_lie_apart_as_asked(rate: float, window: int, fps: float) -> None:
    feed, jitter = Feed(window, fps, clock=Clock(1e9)), np.random.default_rng(3)
    spacing, worst, most = 1 / fps, 0.0, 0
    tolerance = spacing / 8 + 0.6 / rate
    for number in range(int(3 * window * rate / fps)):
        at = number / rate + jitter.uniform(0, 0.05 / rate)
        feed.put("x", at)
        most = max(most, len(feed._buffer))
        try:
            shot = feed.take(0)
        except FeedTimeout:
            assert at < (window - 1) * spacing + tolerance  # it is full as soon as it can be, and stays so
            continue
        assert shot.captured == at  # always with the newest frame
        belongs = [at - back * spacing for back in reversed(range(window))]
        worst = max(worst, *(abs(when - wanted) for when, wanted in zip(shot.times, belongs, strict=True)))
        assert list(shot.times) == sorted(set(shot.times))
    assert worst > 0 or rate < 1 / spacing
    assert worst <= tolerance
    assert most <= 4 * window


def test_a_slow_camera_gives_its_newest_frames() -> None:
    feed = filled(Feed(3, fps=10, clock=Clock()), [1, 2, 3, 4])
    assert feed.take(0).times == (2, 3, 4)


def test_frames_between_those_of_a_window_are_counted_once() -> None:
    feed = Feed(2, fps=1, clock=Clock())
    shown = set[str]()
    total = 0
    for number in range(300):
        filled(feed, [number / 30])
        if number % 45 == 44:
            shot = feed.take(0)
            shown |= set(names(shot))
            total += shot.dropped
            assert total == feed.dropped
    feed.close()
    assert feed.dropped == feed.received - len(shown)


def test_a_clock_that_goes_back_begins_a_new_window() -> None:
    feed = filled(Feed(2, fps=1, clock=Clock()), [50, 51, 10])
    with pytest.raises(FeedTimeout, match="window of 2 frames over 1 s was not full"):
        feed.take(0)
    assert filled(feed, [11]).take(0).times == (10, 11)
    assert filled(feed, [11.5, 11.49]).take(0).captured == 11.49  # a little is only jitter


@pytest.mark.parametrize("step", [0.001, 0.7, 5, 1e9])
@pytest.mark.parametrize("fps", [None, 1.0])
def test_a_clock_that_steps_back_never_starves_a_window(step: float, fps: float | None) -> None:
    before = [10, 11, 12, 12.5]
    feed = filled(Feed(3, fps, clock=Clock(2e9)), before)
    after = [before[-1] - step + number / 2 for number in range(1, 9)]
    for at in after:
        feed.put("new", at)
    times = feed.take(0).times
    assert times[-1] == after[-1]
    assert list(times) == sorted(times)
    assert len(feed._buffer) <= 12
