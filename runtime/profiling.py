"""Measure on a device what a first token is made of: `edgeprune profile` writes it, and a search for plans reads it."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.bundle import VISION, Bundle
from edgeprune.device.roofline import Peaks
from edgeprune.errors import UsageError
from edgeprune.io.files import write_text
from edgeprune.io.typed_json import made, read_json
from edgeprune.runtime.cache import KvCache
from edgeprune.runtime.engine import Engine, StepInput, Tokens
from edgeprune.runtime.peaks import measure_peaks
from edgeprune.runtime.positions import text_positions
from edgeprune.runtime.providers import open_engine

SCHEMA_VERSION = 1
PARTS = 4  # prefill is timed without visual tokens, with a quarter of them, and so on up to all
TEXT = 32  # text tokens of the timed prefill


@dataclass(frozen=True)
class DeviceTimes:
    """Milliseconds of the parts of a first token, unpruned. `prefill_ms`: with 0, 1/4, ... all of `tokens` visual tokens in
    every layer.

    `how`: "measured", or "roofline" where it was computed from a device's peak numbers. `peaks`: what its processor was measured to
    reach, None where only a GPU computes, or in files of before they were measured.
    """

    device: str
    how: str
    tokens: int
    vision_ms: float
    prefill_ms: tuple[float, ...]
    peaks: Peaks | None = None

    @property
    def ttft_ms(self) -> float:
        """Vision encoder and unpruned prefill."""
        return self.vision_ms + self.prefill_ms[-1]

    def save(self, path: Path) -> None:
        """Write the times as JSON, whole or not at all."""
        write_text(path, json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> DeviceTimes:
        """Read times; raise UsageError when the file holds none."""
        try:
            data: dict[str, Any] = read_json(path)
            if data.pop("schema_version") != SCHEMA_VERSION:
                raise UsageError(f"{path} is of another schema version.", hint="Profile the bundle again.")
            found = made(cls, data, "times")
            if not found.prefill_ms or min(found.vision_ms, found.tokens, *found.prefill_ms) < 0:
                raise ValueError("times are missing, or negative")
            return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"Cannot read device times {path}: {error!r}.", hint="Write them with: edgeprune profile") from error


def profile(
    bundle: Bundle, *, repeats: int = 20, threads: int | None = None, provider: str = "cpu", device: str = "this machine"
) -> DeviceTimes:
    """Return the medians of `repeats` runs of a bundle's graphs on random tokens, without pruning, and the processor's peaks.

    Raises EngineError when the provider cannot be had, or its engines were built for shorter turns than an image's tokens.
    """
    engine = open_engine(bundle, provider, threads)
    geometry, shape = bundle.plan.geometry, bundle.manifest.decoder
    rng = np.random.default_rng(0)
    takes = map(int, bundle.manifest.graphs[VISION].inputs["pixel_values"].shape)
    patches = rng.standard_normal(tuple(takes), np.float32)
    vision = _median(lambda: engine.see(patches, whole=True), repeats)
    empty = KvCache.empty(shape)
    counts = [geometry.tokens * part // PARTS for part in range(PARTS + 1)]
    prefill = [_prefill_ms(engine, rng, count, shape.width, shape.position_axes, empty, repeats) for count in counts]
    peaks = measure_peaks(threads) if provider == "cpu" else None
    return DeviceTimes(device, "measured", geometry.tokens, vision, tuple(prefill), peaks)


def reported_peaks(path: Path) -> Peaks:
    """Return the peaks in a file of times; raise UsageError when it has none."""
    peaks = DeviceTimes.load(path).peaks
    if peaks is None:
        raise UsageError(f"{path} has no peaks of a processor.", hint="Measure them: edgeprune profile BUNDLE -o FILE")
    return peaks


def _prefill_ms(engine: Engine, rng: np.random.Generator, count: int, width: int, axes: int, cache: KvCache, repeats: int) -> float:
    # As text: nothing is pruned, whatever the plan says.
    tokens = Tokens(rng.standard_normal((1, count + TEXT, width), np.float32), text_positions(0, count + TEXT, axes))
    nothing = Tokens(np.zeros((1, 0, width), np.float32), np.zeros((axes, 0), np.int64))
    step = StepInput(nothing, nothing, tokens, np.zeros(0, np.int64), np.zeros((count + TEXT, 3), np.float32))
    return _median(lambda: engine.step(step, cache), repeats)


def _median(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)
