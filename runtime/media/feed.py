"""Buffer camera frames so that each question gets the newest ones.

A feed holds only the frames that its next shot may need: one frame, or for a video the newest frames at the video's spacing. Older
frames are dropped and counted.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from PIL import Image

from edgeprune.errors import EdgePruneError, ImageError, UsageError
from edgeprune.runtime.media.frames import DLPack, RawFrame, YCbCr, dlpack_array
from edgeprune.runtime.media.images import ImageSource, file_content, is_file_content

Clock = Callable[[], float]
_FRAMES_PER_SPACING = 4  # frames held for each interval between two frames of a window


class FeedError(EdgePruneError):
    """The feed cannot return a frame."""


class FeedTimeout(FeedError):
    """No new frame arrived before the timeout."""


class FeedClosed(FeedError):
    """The feed was closed."""


@dataclass(frozen=True)
class Shot:
    """The frames of one question, oldest first. `times`: when each was captured, in seconds of the feed's clock.

    `dropped`: frames dropped since the previous shot without being in any shot. `skewed`: the camera's timestamp of the newest
    frame was in the future, so `captured` is the arrival time. `captured_monotonic`: when the newest frame was captured, in seconds
    of time.monotonic, whatever the feed's clock is.
    """

    frames: tuple[ImageSource, ...]
    times: tuple[float, ...]
    dropped: int
    skewed: bool
    clock: Clock = field(repr=False, compare=False, default=time.monotonic)
    captured_monotonic: float = field(kw_only=True, compare=False)

    @property
    def captured(self) -> float:
        """When the newest frame was captured, in seconds of the feed's clock."""
        return self.times[-1]

    @property
    def age_ms(self) -> float:
        """The current age of the newest frame in milliseconds, at least 0."""
        return max(0.0, 1e3 * (self.clock() - self.captured))

    @property
    def picture(self) -> ImageSource | list[ImageSource]:
        """The image argument for `stream` and `ask`: the frame, or the list of a video's frames."""
        return self.frames[0] if len(self.frames) == 1 else list(self.frames)


@dataclass
class _BufferedFrame:
    frame: ImageSource
    captured: float
    captured_monotonic: float
    skewed: bool
    number: int  # arrival number, from 1
    used: bool = False  # part of a shot


class Feed:
    """A thread-safe buffer from cameras to questions. Each frame is returned as the newest only once.

    `window`: frames of one shot. `fps`: frame rate of the window; with None or 0 consecutive frames are used. For a bundle:
    `Feed(window=model.plan.geometry.frames, fps=model.plan.geometry.fps)`. `clock`: the clock of capture times in seconds, such as
    a simulation's. It may step: receipts count a frame's age on time.monotonic, from its age when it was put in.

    Frames of a window are 1 / fps apart, with an error of at most an eighth of that plus half the camera's interval. A camera
    slower than `fps` gives its newest frames at its own spacing (`Shot.times`). At most four frames are held per frame of a window.
    """

    def __init__(self, window: int = 1, fps: float | None = None, *, clock: Clock = time.monotonic) -> None:
        if window < 1:
            raise UsageError(f"window must be 1 or more, not {window}.")
        if fps is not None and not (math.isfinite(fps) and fps >= 0):
            raise UsageError(f"fps must be 0 or more, not {fps}.")
        self._window, self._clock = window, clock
        self._spacing = 1 / fps if fps and window > 1 else 0.0
        self._buffer: deque[_BufferedFrame] = deque()  # oldest first
        self._changed = threading.Condition()
        self._received = self._dropped = 0
        self._taken = self._dropped_before = 0  # number of the newest frame taken, and the frames dropped up to then
        self._closed = False

    @property
    def received(self) -> int:
        """Frames received so far."""
        return self._received

    @property
    def dropped(self) -> int:
        """Frames dropped so far without being in any shot."""
        return self._dropped

    @property
    def closed(self) -> bool:
        """Whether the feed was closed."""
        return self._closed

    def put(self, frame: ImageSource, captured: float | None = None, *, copy: bool = False) -> bool:
        """Add the newest frame without waiting for consumers. Returns False if the feed is closed.

        `captured`: capture time in seconds of the feed's clock, by default now. A time in the future is replaced by now (see
        `Shot.skewed`). A time that goes back drops the frames after it, so that a clock set back starts a new window. The frame is
        kept by reference until newer ones replace it, and while its answer is being prepared. Pass `copy=True` if the camera reuses
        its memory. Raises ImageError for None, which cameras return when they have no frame.
        """
        if frame is None:
            raise ImageError("The camera returned no frame (None).", hint="Check that it is connected, and put only frames.")
        if captured is not None and not math.isfinite(captured):
            raise UsageError(f"captured must be seconds of the feed's clock, not {captured}.")
        frame = _copied(frame) if copy else frame
        with self._changed:
            if self._closed:
                return False
            now = self._clock()
            self._received += 1
            skewed = captured is not None and captured > now
            timestamp = now if captured is None or skewed else captured
            removed = self._evict(timestamp)
            monotonic = time.monotonic() - (now - timestamp)
            self._buffer.append(_BufferedFrame(frame, timestamp, monotonic, skewed, self._received))
            removed += self._expire()
            self._dropped += sum(not buffered.used for buffered in removed)
            self._changed.notify_all()
        return True  # removed frames are freed here, outside the lock

    def take(self, timeout: float | None = None, *, fresh: bool = True) -> Shot:
        """Wait for a frame newer than the last one taken, and return the newest frame or window.

        `timeout`: seconds, None to wait forever. `fresh=False` may return the same frames again. Raises FeedTimeout and FeedClosed.
        """
        with self._changed:
            ready = self._changed.wait_for(lambda: self._closed or self._is_ready(fresh=fresh), timeout)
            if self._closed:
                raise FeedClosed("The feed is closed.", hint="Open a new one to go on.")
            if not ready:
                raise FeedTimeout(self._missing(timeout), hint="Check that the camera still puts frames in.")
            return self._take_window()

    def close(self) -> None:
        """Release all frames. Waiting calls of `take` raise FeedClosed."""
        with self._changed:
            self._closed = True
            removed = list(self._buffer)
            self._buffer.clear()
            self._dropped += sum(not buffered.used for buffered in removed)
            self._changed.notify_all()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Shot]:
        """Yield fresh shots until the feed is closed."""
        while True:
            try:
                shot = self.take()
            except FeedClosed:
                return
            yield shot

    def _evict(self, captured: float) -> list[_BufferedFrame]:
        # Remove what the next frame replaces: frames of a later time, or the newest frame if it follows the last too closely.
        removed = []
        while self._buffer and captured < self._buffer[-1].captured:
            removed.append(self._buffer.pop())
        min_spacing = self._spacing / _FRAMES_PER_SPACING
        if not removed and len(self._buffer) > 1 and self._buffer[-1].captured - self._buffer[-2].captured < min_spacing:
            removed.append(self._buffer.pop())
        return removed

    def _expire(self) -> list[_BufferedFrame]:
        # Keep one frame before the start of the window: it may be closer to the start than the next one.
        start = self._buffer[-1].captured - (self._window - 1) * self._spacing
        removed = []
        while len(self._buffer) > self._window and self._buffer[1].captured <= start:
            removed.append(self._buffer.popleft())
        return removed

    def _is_ready(self, *, fresh: bool) -> bool:
        if len(self._buffer) < self._window or (fresh and self._buffer[-1].number <= self._taken):
            return False
        min_span = (self._window - 1 - 0.5 / _FRAMES_PER_SPACING) * self._spacing
        return self._buffer[-1].captured - self._buffer[0].captured >= min_span

    def _take_window(self) -> Shot:
        chosen = self._choose_frames()
        for buffered in chosen:
            buffered.used = True
        self._taken = chosen[-1].number
        dropped, self._dropped_before = self._dropped - self._dropped_before, self._dropped
        frames, times = tuple(buffered.frame for buffered in chosen), tuple(buffered.captured for buffered in chosen)
        newest = chosen[-1]
        return Shot(frames, times, dropped, newest.skewed, self._clock, captured_monotonic=newest.captured_monotonic)

    def _choose_frames(self) -> list[_BufferedFrame]:
        # From newest to oldest, choose the frame closest to each target time, but leave enough frames for the rest of the window.
        buffer, index = list(self._buffer), len(self._buffer) - 1
        chosen = [buffer[index]]
        for back in range(1, self._window):
            target = buffer[-1].captured - back * self._spacing
            candidates = range(index - 1, self._window - back - 2, -1)
            index = min(candidates, key=lambda candidate: abs(buffer[candidate].captured - target))
            chosen.append(buffer[index])
        return chosen[::-1]

    def _missing(self, timeout: float | None) -> str:
        within = "" if timeout is None else f" within {timeout:g} s"
        if self._window > 1 and not self._is_ready(fresh=False):
            span = f" over {(self._window - 1) * self._spacing:g} s" if self._spacing else ""
            return f"The window of {self._window} frames{span} was not full{within}."
        return f"No new frame came{within}."


def _copied(frame: ImageSource) -> ImageSource:
    if isinstance(frame, (np.ndarray, Image.Image, YCbCr, RawFrame)):
        return frame.copy()
    if isinstance(frame, (str, os.PathLike)):
        return frame
    if is_file_content(frame):
        return file_content(frame)
    copied: np.ndarray = dlpack_array(cast(DLPack, frame)).copy()
    return copied
