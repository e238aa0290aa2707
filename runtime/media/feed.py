"""The latest frame wins: a camera puts frames in as they come, a question takes the newest.

A feed holds what its next shot needs and nothing else: one frame, or for a video the newest frames at the spacing of the video.
Everything older is dropped and counted.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.runtime.media.frames import NV12, dlpack_array
from edgeprune.runtime.media.images import ImageSource

Clock = Callable[[], float]
_PARTS = 4  # of the spacing between two frames of a video: how finely older frames are kept


class FeedError(EdgePruneError):
    """A feed that gives no frame."""


class FeedTimeout(FeedError):
    """No new frame came in time."""


class FeedClosed(FeedError):
    """The feed was closed."""


@dataclass(frozen=True)
class Shot:
    """What a question is asked about: `frames`, oldest first, and when each was captured, in seconds of the feed's clock.

    `dropped`: frames since the shot before that no shot has shown and none will. `skewed`: the camera said that the newest frame
    was captured after it came, so `captured` is when it came.
    """

    frames: tuple[ImageSource, ...]
    times: tuple[float, ...]
    dropped: int
    skewed: bool
    clock: Clock = field(repr=False, compare=False, default=time.monotonic)

    @property
    def captured(self) -> float:
        """When the newest frame was captured, in seconds of the feed's clock."""
        return self.times[-1]

    @property
    def age_ms(self) -> float:
        """How long ago that was, now and never below 0."""
        return max(0.0, 1e3 * (self.clock() - self.captured))

    @property
    def picture(self) -> ImageSource | list[ImageSource]:
        """What `stream` and `ask` take as an image: the frame, or of a video the list of its frames."""
        return self.frames[0] if len(self.frames) == 1 else list(self.frames)


@dataclass
class _BufferedFrame:
    frame: ImageSource
    captured: float
    skewed: bool
    number: int  # 1 for the first frame that ever came
    shown: bool = False


class Feed:
    """Takes frames from any number of threads and gives the newest to any number of others; each is given as new only once.

    `window`: frames of one shot. `fps`: how many of them a second of video has; None or 0 takes them as they come. For a bundle:
    `Feed(window=model.plan.geometry.frames, fps=model.plan.geometry.fps)`. `clock`: seconds, and it never goes back.

    Frames of a window lie 1 / fps apart, to within an eighth of that and half the camera's own interval; a camera slower than `fps`
    gives its newest frames, at its own spacing (`Shot.times`). At most four frames are held for each of a window.
    """

    def __init__(self, window: int = 1, fps: float | None = None, *, clock: Clock = time.monotonic) -> None:
        if window < 1:
            raise UsageError(f"window must be 1 or more, not {window}.")
        if fps is not None and not (math.isfinite(fps) and fps >= 0):
            raise UsageError(f"fps must be 0 or more, not {fps}.")
        self._window, self._clock = window, clock
        self._spacing = 1 / fps if fps and window > 1 else 0.0
        self._held: deque[_BufferedFrame] = deque()  # oldest first
        self._changed = threading.Condition()
        self._received = self._dropped = 0
        self._taken = self._dropped_then = 0  # number of the last frame that was taken as new, and what had been dropped by then
        self._closed = False

    @property
    def received(self) -> int:
        """Frames that ever came."""
        return self._received

    @property
    def dropped(self) -> int:
        """Frames that came and that no shot has shown nor will."""
        return self._dropped

    @property
    def closed(self) -> bool:
        """Whether the feed was closed."""
        return self._closed

    def put(self, frame: ImageSource, captured: float | None = None, *, copy: bool = False) -> bool:
        """Take in the newest frame, without ever waiting for who takes it; return False if the feed is closed.

        `captured`: when it was, in seconds of the feed's clock, now if not given. It is not believed where it lies in the future,
        see `Shot.skewed`; where it goes back by more than the spacing a new window begins. The frame is kept as it is, by
        reference, until newer ones replace it, also while an answer about it is being prepared: pass `copy=True` where the camera
        writes the next frame into the same memory.
        """
        if captured is not None and not math.isfinite(captured):
            raise UsageError(f"captured must be seconds of the feed's clock, not {captured}.")
        frame = _copied(frame) if copy else frame
        with self._changed:
            if self._closed:
                return False
            now = self._clock()
            self._received += 1
            skewed = captured is not None and captured > now
            when = now if captured is None or skewed else captured
            gone = self._evict(when)
            self._held.append(_BufferedFrame(frame, when, skewed, self._received))
            gone += self._expire()
            self._dropped += sum(not held.shown for held in gone)
            self._changed.notify_all()
        return True  # and what is gone is freed only here, outside the lock

    def take(self, timeout: float | None = None, *, fresh: bool = True) -> Shot:
        """Return the newest frame, or window of frames, as soon as there is one newer than the last that was taken.

        `timeout`: seconds, None to wait for ever. `fresh=False` takes the same again. Raises FeedTimeout and FeedClosed.
        """
        with self._changed:
            ready = self._changed.wait_for(lambda: self._closed or self._is_ready(fresh=fresh), timeout)
            if self._closed:
                raise FeedClosed("The feed is closed.", hint="Open a new one to go on.")
            if not ready:
                raise FeedTimeout(self._missing(timeout), hint="Check that the camera still puts frames in.")
            return self._take_window()

    def close(self) -> None:
        """Let go of all frames and end the waiting of others, who get FeedClosed."""
        with self._changed:
            self._closed = True
            gone = list(self._held)
            self._held.clear()
            self._dropped += sum(not held.shown for held in gone)
            self._changed.notify_all()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Shot]:
        """Yield fresh shots, waiting for each, until the feed is closed."""
        while True:
            try:
                shot = self.take()
            except FeedClosed:
                return
            yield shot

    def _evict(self, captured: float) -> list[_BufferedFrame]:
        # What the next frame replaces: all of it when time goes back, the newest when it is too close to its neighbour to be kept.
        if self._spacing and self._held and captured < self._held[-1].captured - self._spacing:
            gone = list(self._held)
            self._held.clear()
            return gone
        close = self._spacing / _PARTS
        if len(self._held) > 1 and self._held[-1].captured - self._held[-2].captured < close:
            return [self._held.pop()]
        return []

    def _expire(self) -> list[_BufferedFrame]:
        # A frame before the window's begin may stand closer to it than the next one, so one of those is kept.
        begin = self._held[-1].captured - (self._window - 1) * self._spacing
        gone = []
        while len(self._held) > self._window and self._held[1].captured <= begin:
            gone.append(self._held.popleft())
        return gone

    def _is_ready(self, *, fresh: bool) -> bool:
        if len(self._held) < self._window or (fresh and self._held[-1].number <= self._taken):
            return False
        wanted = (self._window - 1 - 0.5 / _PARTS) * self._spacing
        return self._held[-1].captured - self._held[0].captured >= wanted

    def _take_window(self) -> Shot:
        chosen = self._chosen()
        for held in chosen:
            held.shown = True
        self._taken = chosen[-1].number
        dropped, self._dropped_then = self._dropped - self._dropped_then, self._dropped
        frames, times = tuple(held.frame for held in chosen), tuple(held.captured for held in chosen)
        return Shot(frames, times, dropped, chosen[-1].skewed, self._clock)

    def _chosen(self) -> list[_BufferedFrame]:
        # From the newest backwards, each time the frame closest to where one belongs that leaves enough for the rest.
        held, at = list(self._held), len(self._held) - 1
        chosen = [held[at]]
        for back in range(1, self._window):
            wanted = held[-1].captured - back * self._spacing
            others = range(at - 1, self._window - back - 2, -1)
            at = min(others, key=lambda index: abs(held[index].captured - wanted))
            chosen.append(held[at])
        return chosen[::-1]

    def _missing(self, timeout: float | None) -> str:
        within = "" if timeout is None else f" within {timeout:g} s"
        if self._window > 1 and not self._is_ready(fresh=False):
            span = f" over {(self._window - 1) * self._spacing:g} s" if self._spacing else ""
            return f"The window of {self._window} frames{span} was not full{within}."
        return f"No new frame came{within}."


def _copied(frame: ImageSource) -> ImageSource:
    if isinstance(frame, (np.ndarray, Image.Image, NV12)):
        return frame.copy()
    if isinstance(frame, (str, os.PathLike)):
        return frame
    copied: np.ndarray = dlpack_array(frame).copy()
    return copied
