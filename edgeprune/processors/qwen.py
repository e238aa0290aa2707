"""The image processor of Qwen2-VL and its successors: images of any size, resized to a multiple of the visual token.

It is bit-identical to transformers' models/qwen2_vl/image_processing_pil_qwen2_vl.py: choice of the size, Pillow's resize on uint8,
rescaling in float64 rounded to float32, normalization in float32, and patch order. Keys missing from preprocessor_config.json have
that class's defaults. In a video, `temporal_patch_size` frames make one patch in time, and the last frame is repeated to complete
the last patch, as in models/qwen2_vl/video_processing_qwen2_vl.py. Departure: upstream resizes frames with torchvision, this module
with Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.errors import ImageError
from edgeprune.plan import Geometry, View
from edgeprune.processors.base import CLIP, levels, require_aspect, require_pixels, require_rgb
from edgeprune.processors.settings import Triple, positive, refusal, require_on, resample, rescale_factor, triple


@dataclass(frozen=True)
class GridSpec:
    """Qwen2-VL: `mean` and `std` per channel. `tokens_per_second`: time positions per second of a video, or 0 to count frames."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    mean: Triple
    std: Triple
    rescale_factor: float
    resample: int
    tokens_per_second: float = 0.0
    spatial: bool = True

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> GridSpec:
        """Return the spec of the settings in a preprocessor_config.json; raise BundleError for unsupported ones."""
        require_on(settings, "do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
        min_pixels, max_pixels = _area_limits(settings)
        return cls(
            patch_size=positive(settings, "patch_size", 14),
            merge_size=positive(settings, "merge_size", 2),
            temporal_patch_size=positive(settings, "temporal_patch_size", 2),
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            mean=triple(settings, "image_mean", CLIP[0]),
            std=triple(settings, "image_std", CLIP[1]),
            rescale_factor=rescale_factor(settings),
            resample=resample(settings),
            tokens_per_second=_tokens_per_second(settings),
        )

    def default_size(self) -> tuple[int, int] | None:
        """Return a square if the settings allow only one area and it is a square of visual tokens, else None."""
        side = math.isqrt(self.min_pixels)
        only = (
            self.min_pixels == self.max_pixels
            and side * side == self.min_pixels
            and side % (self.patch_size * self.merge_size) == 0
        )
        return (side, side) if only else None

    def geometry(self, height: int, width: int, frames: int = 1, fps: float = 0.0) -> Geometry:
        """Return the geometry of an image of this size, or of a video of such frames."""
        rows, columns = (count * self.patch_size for count in self.grid(height, width))
        plain = Geometry(rows, columns, self.patch_size, self.merge_size)
        if frames == 1:
            return plain
        times = self._times(-(-frames // self.temporal_patch_size), fps)
        views = [View(0, 0, rows, columns, plain.rows, plain.columns, time=time) for time in times]
        return Geometry(rows, columns, self.patch_size, self.merge_size, tuple(views), frames, fps)

    def canvas(self, image: Image.Image, frames: int = 1) -> Image.Image:
        """Return the image resized to a multiple of the visual token."""
        rows, columns = self.grid(image.height, image.width)
        return require_rgb(image).resize((columns * self.patch_size, rows * self.patch_size), Image.Resampling(self.resample))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the patch grid (rows, columns) of an image of this size; raise ImageError if it is empty or too oblong."""
        require_pixels(height, width)
        require_aspect(height, width)
        unit = self.patch_size * self.merge_size
        # round() rounds halves to even, as upstream does.
        rows, columns = round(height / unit), round(width / unit)
        if rows * columns * unit**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows = max(1, math.floor(height / shrink / unit))
            columns = max(1, math.floor(width / shrink / unit))
        elif rows * columns * unit**2 < self.min_pixels:
            enlarge = math.sqrt(self.min_pixels / (height * width))
            rows, columns = math.ceil(height * enlarge / unit), math.ceil(width * enlarge / unit)
        return rows * self.merge_size, columns * self.merge_size

    def patches(self, frames: Sequence[Image.Image]) -> np.ndarray:
        """Return float32 patches [time * rows * columns, 3 * temporal * patch * patch] of an image, or of a video's frames.

        The patches of one visual token (merge x merge) are adjacent; tokens are in reading order.
        """
        repeats = self.temporal_patch_size
        if len(frames) == 1:
            return self._time_step([frames[0]])
        padded = [*frames, *[frames[-1]] * (-len(frames) % repeats)]
        return np.concatenate([self._time_step(padded[begin : begin + repeats]) for begin in range(0, len(padded), repeats)])

    def _times(self, steps: int, fps: float) -> list[int]:
        # Temporal positions: step numbers, or scaled seconds in float32 and rounded down, as in Qwen2.5-VL's model.
        if not self.tokens_per_second:
            return list(range(steps))
        if fps <= 0:
            raise ImageError(
                "This model places frames by their time: a video needs its frames per second.", hint="Give --fps 2, say."
            )
        interval = np.float32(self.tokens_per_second) * np.float32(self.temporal_patch_size / fps)
        times: list[int] = (np.arange(steps, dtype=np.float32) * interval).astype(np.int64).tolist()
        return times

    def _time_step(self, frames: Sequence[Image.Image]) -> np.ndarray:
        # The patches of one step in time; a single frame is repeated.
        patch, merge, repeats = self.patch_size, self.merge_size, self.temporal_patch_size
        rows, columns = (count // merge for count in self.grid(frames[0].height, frames[0].width))
        values = np.empty((rows, columns, merge, merge, 3, repeats, patch, patch), np.float32)
        table = levels(self.rescale_factor, self.mean, self.std)
        for time, frame in enumerate(frames):
            pixels = np.asarray(self.canvas(frame))
            filled = slice(None) if len(frames) == 1 else slice(time, time + 1)
            for channel in range(3):
                plane = table[channel][pixels[..., channel]].reshape(rows, merge, patch, columns, merge, patch)
                values[:, :, :, :, channel, filled] = plane.transpose(0, 3, 1, 4, 2, 5)[:, :, :, :, None]
        return values.reshape(rows * columns * merge * merge, -1)


def _area_limits(config: Mapping[str, Any]) -> tuple[int, int]:
    # Top-level min_pixels and max_pixels take precedence over "size", for which older releases use two spellings.
    size = config.get("size") or {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    if not isinstance(size, Mapping):
        raise refusal("size", size, "an object with shortest_edge and longest_edge")
    limits = {}
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        limits[key] = next((value for value in (config.get(key), size.get(edge), size.get(key)) if value is not None), None)
    smallest, largest = positive(limits, "min_pixels"), positive(limits, "max_pixels")
    if smallest > largest:
        raise refusal("min_pixels", smallest, f"max_pixels ({largest}) or less")
    return smallest, largest


def _tokens_per_second(config: Mapping[str, Any]) -> float:
    value = config.get("tokens_per_second", 0.0)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise refusal("tokens_per_second", value, "a number, zero or above")
    return float(value)
