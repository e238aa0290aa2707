"""Joules since a runtime was loaded, by sampling what the machine draws."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from edgeprune.device.power import PowerSource

_PAUSE_S = 0.05


class EnergyCounter:
    """Counts what a source says is drawn, from now until `close`. Of the whole machine: what idles and what else runs is in it."""

    def __init__(self, source: PowerSource, clock: Callable[[], float] = time.perf_counter) -> None:
        self._source, self._clock = source, clock
        self._last: tuple[float, float] | None = None  # seconds, milliwatts
        self._total: float | None = None
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def joules(self) -> float | None:
        """Energy up to now; None while there is no reading."""
        self._sample()
        return self._total

    def close(self) -> None:
        """Stop counting, and let go of the source."""
        self._stop.set()
        self._thread.join()
        self._source.close()

    def _run(self) -> None:
        while not self._stop.wait(_PAUSE_S):
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            power = self._source.read()
            if power is None:
                return
            now = (self._clock(), power.milliwatts)
            if self._last is not None:
                self._total = (self._total or 0.0) + (now[0] - self._last[0]) * (now[1] + self._last[1]) / 2000
            self._last, self._total = now, self._total or 0.0
