"""Device profiles: times that `edgeprune profile` measures and that a search with a latency target reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.device.roofline import Peaks
from edgeprune.errors import UsageError
from edgeprune.io.files import write_text
from edgeprune.io.typed_json import fault, from_json, read_json

SCHEMA_VERSION = 1
PARTS = 4  # prefill is timed with 0, 1/4, ... 4/4 of the visual tokens
TEXT = 32  # text tokens of the timed prefill


@dataclass(frozen=True)
class DeviceProfile:
    """Times in milliseconds of vision encoder and unpruned prefill.

    `prefill_ms`: with 0, 1/4, ... 4/4 of `tokens` visual tokens in every layer. `how`: "measured", or "roofline" if computed from a
    device's peaks. `peaks`: measured peaks of the processor; None for a GPU, or in older files.
    """

    device: str
    how: str
    tokens: int
    vision_ms: float
    prefill_ms: tuple[float, ...]
    peaks: Peaks | None = None

    @property
    def ttft_ms(self) -> float:
        """Time of vision encoder and unpruned prefill."""
        return self.vision_ms + self.prefill_ms[-1]

    def save(self, path: Path) -> None:
        """Write the profile as JSON, atomically."""
        write_text(path, json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> DeviceProfile:
        """Read a profile; raise UsageError if the file is not a valid one."""
        try:
            data: dict[str, Any] = read_json(path)
            if data.pop("schema_version") != SCHEMA_VERSION:
                raise UsageError(f"{path} is of another schema version.", hint="Profile the bundle again.")
            found = from_json(cls, data, "times")
            if not found.prefill_ms or min(found.vision_ms, found.tokens, *found.prefill_ms) < 0:
                raise ValueError("times are missing, or negative")
            return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"Cannot read device times {path}: {fault(error)}.", hint="Write them with: edgeprune profile BUNDLE -o FILE"
            ) from error


def reported_peaks(path: Path) -> Peaks:
    """Return the peaks of a profile; raise UsageError if it has none."""
    peaks = DeviceProfile.load(path).peaks
    if peaks is None:
        raise UsageError(f"{path} has no peaks of a processor.", hint="Measure them: edgeprune profile BUNDLE -o FILE")
    return peaks
