"""From an RGB image to the patches a Qwen2-VL vision tower eats.

Bit for bit what transformers does in models/qwen2_vl/image_processing_pil_qwen2_vl.py: the choice of the size, Pillow's
resize on uint8, rescaling in float64 rounded to float32, normalization in float32, and the patch order. Defaults of keys
that a preprocessor_config.json leaves out are that class's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.errors import BundleError, ImageError, UsageError
from edgeprune.plan import Geometry

MAX_ASPECT = 200
FITS = ("exact", "stretch", "pad")

_GREY = (128, 128, 128)
_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
_ALWAYS_ON = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class ImageSpec:
    """How a model wants its images; `resample` is Pillow's number of the filter, `mean` and `std` are per channel."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    mean: Triple
    std: Triple
    rescale_factor: float
    resample: int

    @classmethod
    def from_processor_config(cls, config: Mapping[str, Any]) -> ImageSpec:
        """Return the spec in a preprocessor_config.json; raise BundleError for what this runtime cannot honour."""
        kind = config.get("image_processor_type", _PROCESSORS[0])
        if kind not in _PROCESSORS:
            raise _refusal("image_processor_type", kind, " or ".join(_PROCESSORS))
        for key in _ALWAYS_ON:
            if config.get(key) not in (None, True):
                raise _refusal(key, config[key], "true")
        min_pixels, max_pixels = _area_limits(config)
        return cls(
            patch_size=_positive(config, "patch_size", 14),
            merge_size=_positive(config, "merge_size", 2),
            temporal_patch_size=_positive(config, "temporal_patch_size", 2),
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            mean=_triple(config, "image_mean", _CLIP_MEAN),
            std=_triple(config, "image_std", _CLIP_STD),
            rescale_factor=_rescale_factor(config),
            resample=_resample(config),
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the patch grid (rows, columns) of an image of this size; raise ImageError when it is too oblong."""
        if min(height, width) < 1:
            raise ImageError(f"An image of {width}x{height} pixels is empty.", hint="Give an image with pixels in it.")
        if max(height, width) / min(height, width) > MAX_ASPECT:
            raise ImageError(f"A {width}x{height} image is too oblong: the limit is {MAX_ASPECT}:1.", hint="Crop it or pad it.")
        unit = self.patch_size * self.merge_size
        # round() sends halves to the even neighbour; upstream counts on it.
        rows, columns = round(height / unit), round(width / unit)
        if rows * columns * unit**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows = max(1, math.floor(height / shrink / unit))
            columns = max(1, math.floor(width / shrink / unit))
        elif rows * columns * unit**2 < self.min_pixels:
            enlarge = math.sqrt(self.min_pixels / (height * width))
            rows, columns = math.ceil(height * enlarge / unit), math.ceil(width * enlarge / unit)
        return rows * self.merge_size, columns * self.merge_size

    def patches(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Return float32 patches [rows * columns, 3 * temporal * patch * patch] and the patch grid (rows, columns).

        The patches of one visual token (merge x merge) stand together; tokens are in reading order.
        """
        if image.mode != "RGB":
            raise ImageError(f"Patches need an RGB image, not mode {image.mode}.", hint="Pass it through read_image first.")
        rows, columns = self.grid(image.height, image.width)
        patch, merge, repeats = self.patch_size, self.merge_size, self.temporal_patch_size
        pixels = np.asarray(image.resize((columns * patch, rows * patch), Image.Resampling(self.resample)))
        blocks = pixels.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
        blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # [token rows, token columns, merge, merge, 3, patch, patch]
        blocks = blocks.reshape(rows * columns, 3, 1, patch * patch)
        values = np.empty((rows * columns, 3, repeats, patch * patch), np.float32)
        for channel, levels in enumerate(self._levels()):
            values[:, channel] = levels[blocks[:, channel]]  # the frames of a still image are equal
        return values.reshape(rows * columns, -1), (rows, columns)

    def _levels(self) -> np.ndarray:
        # Normalized values of the 256 pixel levels [3, 256]: looking up is faster than arithmetic on every pixel.
        scaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(triple, np.float32)[:, None] for triple in (self.mean, self.std))
        levels: np.ndarray = (scaled - mean) / std
        return levels


def fit(image: Image.Image, geometry: Geometry, how: str, spec: ImageSpec) -> Image.Image:
    """Return an RGB image whose patches fill `geometry`.

    `how`: "exact" returns the image itself when its own grid is the geometry's and raises ImageError otherwise, "stretch"
    resizes it without regard to its aspect, "pad" keeps the aspect and fills up with grey bars.
    """
    if how not in FITS:
        raise UsageError(f"Unknown fit {how!r}.", hint=f"Fits are: {', '.join(FITS)}.")
    wanted = _grid_of(geometry, spec)
    own = spec.grid(image.height, image.width)
    size, resample = (geometry.width, geometry.height), Image.Resampling(spec.resample)
    if how == "stretch":
        return image.resize(size, resample)
    if how == "pad":
        return _letterbox(image, size, resample)
    if own != wanted:
        raise _misfit(image, geometry, own)
    return image


def _grid_of(geometry: Geometry, spec: ImageSpec) -> tuple[int, int]:
    grid = (geometry.height // geometry.patch, geometry.width // geometry.patch)
    units = (geometry.patch, geometry.merge)
    if units != (spec.patch_size, spec.merge_size) or grid != spec.grid(geometry.height, geometry.width):
        raise BundleError(
            f"The bundle takes {geometry}, which its image processor never makes: that keeps images between "
            f"{spec.min_pixels} and {spec.max_pixels} pixels, in patches of {spec.patch_size}.",
            hint="Export the bundle again for a size that it does make.",
        )
    return grid


def _letterbox(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    width, height = size
    scale = min(width / image.width, height / image.height)
    inner = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)
    canvas = Image.new("RGB", size, _GREY)
    canvas.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    return canvas


def _misfit(image: Image.Image, geometry: Geometry, own: tuple[int, int]) -> ImageError:
    rows, columns = own[0] // geometry.merge, own[1] // geometry.merge
    return ImageError(
        f"The bundle takes {geometry}, but this {image.width}x{image.height} image makes {rows} x {columns}.",
        hint='Give an image of that shape, or choose "stretch" (distorts it) or "pad" (adds grey bars) instead of "exact".',
    )


def _area_limits(config: Mapping[str, Any]) -> tuple[int, int]:
    # Top-level min_pixels and max_pixels win over "size", which files of older releases spell in two ways.
    size = config.get("size") or {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    if not isinstance(size, Mapping):
        raise _refusal("size", size, "an object with shortest_edge and longest_edge")
    limits = {}
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        limits[key] = next((value for value in (config.get(key), size.get(edge), size.get(key)) if value is not None), None)
    smallest, largest = _positive(limits, "min_pixels"), _positive(limits, "max_pixels")
    if smallest > largest:
        raise _refusal("min_pixels", smallest, f"max_pixels ({largest}) or less")
    return smallest, largest


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _refusal(key, value, "a positive integer")
    return value


def _triple(config: Mapping[str, Any], key: str, default: Triple) -> Triple:
    value = config.get(key, default)
    values = [value] * 3 if _is_number(value) else value
    if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(map(_is_number, values)):
        raise _refusal(key, value, "three numbers")
    if key == "image_std" and min(values) <= 0:
        raise _refusal(key, value, "above zero")
    return (float(values[0]), float(values[1]), float(values[2]))


def _rescale_factor(config: Mapping[str, Any]) -> float:
    value = config.get("rescale_factor", 1 / 255)
    if not _is_number(value) or value <= 0:
        raise _refusal("rescale_factor", value, "a number above zero")
    return float(value)


def _resample(config: Mapping[str, Any]) -> int:
    value = config.get("resample", int(Image.Resampling.BICUBIC))
    known = {int(filter_) for filter_ in Image.Resampling}
    if not isinstance(value, int) or isinstance(value, bool) or value not in known:
        raise _refusal("resample", value, f"Pillow's number of a filter ({min(known)} to {max(known)})")
    return int(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _refusal(key: str, value: object, wanted: str) -> BundleError:
    message = f"The image processor's {key} is {value!r}, but must be {wanted}."
    return BundleError(message, hint="Check preprocessor_config.json.")
