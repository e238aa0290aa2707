"""The latest frame wins: nobody waits for a slow reader, nothing old is answered, and every frame is accounted for."""

from __future__ import annotations

import gc
import io
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgeprune.errors import EdgePruneError, ImageError, UsageError
from edgeprune.runtime.media.feed import Feed, FeedClosed, FeedError, FeedTimeout, Shot
from edgeprune.runtime.media.frames import NV12, RawFrame, YCbCr, scale_to_8_bits
from edgeprune.runtime.media.images import read_image

LIMIT = 10  # seconds, of every wait


class Clock:
    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 2), "red").save(file, "PNG")
    return file.getvalue()


def names(shot: Shot) -> list[str]:
    return [str(frame) for frame in shot.frames]


def started(call: Any) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def filled(feed: Feed, times: list[float]) -> Feed:
    for at in times:
        feed.put(f"{at:g}", at)
    return feed


def test_the_newest_is_taken_and_the_rest_is_counted() -> None:
    feed = Feed()
    for name in ("a", "b", "c"):
        assert feed.put(name)
    shot = feed.take(LIMIT)
    assert (shot.frames, shot.picture, shot.dropped) == (("c",), "c", 2)
    feed.put("d")
    assert (feed.take(LIMIT).dropped, feed.received, feed.dropped) == (0, 4, 2)
    for name in ("e", "f"):
        feed.put(name)
    assert (feed.take(LIMIT).dropped, feed.received, feed.dropped) == (1, 6, 3)


def test_a_frame_is_new_only_once() -> None:
    feed = Feed()
    feed.put("a")
    feed.take(LIMIT)
    with pytest.raises(FeedTimeout, match=r"No new frame came within 0\.01 s"):
        feed.take(0.01)
    again = feed.take(0, fresh=False)
    assert (names(again), again.dropped) == (["a"], 0)
    feed.put("b")
    assert names(feed.take(0)) == ["b"]
    assert feed.dropped == 0  # both were shown


def test_taking_waits_for_the_next_frame() -> None:
    feed, taken = Feed(), list[Shot]()
    reader = started(lambda: taken.append(feed.take(LIMIT)))
    assert not taken
    feed.put("a")
    reader.join(LIMIT)
    assert names(taken[0]) == ["a"]


def test_age_is_counted_from_the_capture() -> None:
    clock = Clock()
    feed = Feed(clock=clock)
    feed.put("a", captured=99.75)
    shot = feed.take(0)
    assert shot.captured == 99.75
    assert shot.age_ms == 250
    clock.now = 101
    assert shot.age_ms == 1250  # now, not when it was taken
    feed.put("b")
    assert feed.take(0).age_ms == 0


def test_a_future_capture_is_not_believed() -> None:
    clock = Clock()
    feed = Feed(clock=clock)
    feed.put("a", captured=5000.0)  # of another clock: it would never age
    shot = feed.take(0)
    assert (shot.captured, shot.age_ms, shot.skewed) == (100, 0, True)
    clock.now = 100.5
    assert shot.age_ms == 500
    clock.now = 90  # a clock that goes back after all
    assert shot.age_ms == 0
    feed.put("b", captured=89.0)
    assert not feed.take(0).skewed


def test_age_on_the_monotonic_clock_is_that_of_the_feeds_own_clock() -> None:
    clock = Clock(1.7e9)  # seconds since 1970
    feed = Feed(clock=clock)
    feed.put("a", captured=clock.now - 1)
    clock.now -= 3600  # set back before the frame is asked about
    shot = feed.take(0)
    assert 1 <= time.monotonic() - shot.captured_monotonic < LIMIT


def test_a_camera_without_a_frame_is_named() -> None:
    feed = Feed()
    with pytest.raises(ImageError, match="The camera returned no frame"):
        feed.put(None)  # type: ignore[arg-type]
    assert feed.received == 0


def test_a_camera_that_changes_its_size_gives_its_newest_frame() -> None:
    feed = Feed()
    for side in (4, 6):
        feed.put(np.zeros((side, side, 3), np.uint8))
    frame = feed.take(0).frames[0]
    assert isinstance(frame, np.ndarray) and frame.shape == (6, 6, 3)


@pytest.mark.parametrize("captured", [float("nan"), float("inf")])
def test_a_capture_that_is_no_time_is_refused(captured: float) -> None:
    with pytest.raises(UsageError, match="captured must be seconds"):
        Feed().put("a", captured)


def test_one_frame_is_whatever_came_last() -> None:
    assert filled(Feed(clock=Clock()), [50, 10]).take(0).captured == 10


def test_frames_are_kept_as_they_are_unless_a_copy_is_asked_for() -> None:
    feed, buffer = Feed(), np.zeros((2, 2, 3), np.uint8)
    feed.put(buffer)
    assert feed.take(0).frames[0] is buffer
    feed.put(buffer, copy=True)
    buffer[:] = 9
    copied = feed.take(0).frames[0]
    assert isinstance(copied, np.ndarray)
    assert not copied.any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Image.new("RGB", (4, 2)),
        lambda: NV12(np.full(12, 128, np.uint8), 4, 2),
        lambda: torch.zeros(2, 4, 3, dtype=torch.uint8),
        lambda: np.zeros((2, 4, 3), np.uint8),
        lambda: bytearray(png()),
        lambda: io.BytesIO(png()),
        lambda: YCbCr(np.full((2, 4), 90, np.uint8), np.full((2, 2, 2), 128, np.uint8)),
        lambda: RawFrame(np.full((2, 4), 900, np.uint16), scale_to_8_bits),
    ],
)
def test_everything_that_is_an_image_can_be_copied(make: Any) -> None:
    feed, frame = Feed(), make()
    feed.put(frame, copy=True)
    copied = feed.take(0).frames[0]
    assert copied is not frame
    assert read_image(copied).tobytes() == read_image(frame).tobytes()


def test_paths_need_no_copy_and_other_things_have_none() -> None:
    feed = Feed()
    feed.put(Path("a.png"), copy=True)
    assert feed.take(0).frames == (Path("a.png"),)
    with pytest.raises(ImageError, match="builtins int"):
        feed.put(5, copy=True)  # type: ignore[arg-type]


def test_frames_that_were_replaced_are_let_go() -> None:
    feed = Feed()
    old = Image.new("RGB", (4, 4))
    gone = weakref.ref(old)
    feed.put(old)
    del old
    feed.put("newer")
    gc.collect()
    assert gone() is None


def test_closing_ends_every_wait_and_lets_go() -> None:
    feed, errors = Feed(), list[EdgePruneError]()

    def read() -> None:
        try:
            feed.take(LIMIT)
        except FeedError as error:
            errors.append(error)

    readers = [started(read) for _ in range(3)]
    with feed:
        pass
    for reader in readers:
        reader.join(LIMIT)
    assert [type(error) for error in errors] == [FeedClosed] * 3
    assert feed.closed
    assert feed.put("late") is False
    with pytest.raises(FeedClosed, match="The feed is closed"):
        feed.take(fresh=False)
    feed.close()
    assert (feed.received, feed.dropped) == (0, 0)


def test_iterating_gives_every_shot_until_it_is_closed() -> None:
    feed, seen, shown = Feed(), list[str](), threading.Semaphore(0)

    def read() -> None:
        for shot in feed:
            seen.extend(names(shot))
            shown.release()

    reader = started(read)
    for name in ("a", "b", "c"):
        feed.put(name)
        assert shown.acquire(timeout=LIMIT)
    feed.put("d")
    assert shown.acquire(timeout=LIMIT)
    feed.close()
    reader.join(LIMIT)
    assert not reader.is_alive()
    assert seen == ["a", "b", "c", "d"]


@pytest.mark.parametrize(("options", "words"), [({"window": 0}, "window"), ({"fps": -1.0}, "fps"), ({"fps": float("nan")}, "fps")])
def test_feeds_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"{words} must be"):
        Feed(**options)


def test_an_image_bundle_has_no_rate() -> None:
    assert names(filled(Feed(1, fps=0.0, clock=Clock()), [1, 2]).take(0)) == ["2"]


@pytest.mark.parametrize(("window", "fps"), [(1, None), (3, 2000.0)])
def test_many_threads_at_once(window: int, fps: float | None) -> None:
    feed, each, cameras = Feed(window, fps), 4000, 3
    shots, longest = list[Shot](), list[float]()

    def film(camera: int) -> None:
        slowest = 0.0
        for number in range(each):
            began = time.thread_time()
            assert feed.put(f"{camera}:{number}")
            slowest = max(slowest, time.thread_time() - began)
        longest.append(slowest)

    def read() -> None:
        for shot in feed:
            shots.append(shot)

    readers = [started(read) for _ in range(3)]
    films = [started(lambda camera=camera: film(camera)) for camera in range(cameras)]
    for thread in films:
        thread.join(LIMIT)
    feed.close()
    for thread in readers:
        thread.join(LIMIT)
    assert not any(thread.is_alive() for thread in (*films, *readers))
    assert feed.received == cameras * each
    newest = [shot.frames[-1] for shot in shots]
    assert len(set(newest)) == len(newest)  # nobody got the same as new
    shown = {frame for shot in shots for frame in shot.frames}
    assert len(shown) + feed.dropped == feed.received
    assert len(longest) == cameras
    assert max(longest) < 0.5
    assert all(list(shot.times) == sorted(shot.times) for shot in shots)
