"""Read and validate the settings of an image processor (preprocessor_config.json). Unsupported values raise BundleError."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from PIL import Image

from edgeprune.errors import BundleError

Triple = tuple[float, float, float]


def require_on(config: Mapping[str, Any], *keys: str) -> None:
    """Raise BundleError for a step that is switched off; a missing key means on."""
    for key in keys:
        if config.get(key) not in (None, True):
            raise refusal(key, config[key], "true")


def require_off(config: Mapping[str, Any], *keys: str) -> None:
    """Raise BundleError for a step that is switched on; a missing key means off."""
    for key in keys:
        if config.get(key) not in (None, False):
            raise refusal(key, config[key], "false")


def switch(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """Return a boolean setting."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise refusal(key, value, "true or false")
    return value


def sides(config: Mapping[str, Any], key: str, default: Mapping[str, int], *, square: bool) -> dict[str, int]:
    """Return the named sides of a size in pixels. One number is a `square` or shortest_edge, two are height and width."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if not isinstance(value, Mapping):
        raise refusal(key, value, "an object with the sides in pixels")
    named = {name: side for name, side in value.items() if side is not None}
    if not named or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in named.values()):
        raise refusal(key, value, "sides of at least one pixel")
    return named


def variants(*names: str) -> tuple[str, ...]:
    """Return the class names of processors in transformers, with the suffixes of all implementations."""
    return tuple(f"{name}{suffix}" for name in names for suffix in ("", "Fast", "Pil"))


def plain_name(config: Mapping[str, Any], default: str) -> str:
    """Return the name of the processor class without the suffix of an implementation."""
    return str(config.get("image_processor_type", default)).removesuffix("Fast").removesuffix("Pil")


def positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a positive integer setting."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refusal(key, value, "a positive integer")
    return value


def triple(config: Mapping[str, Any], key: str, default: Triple) -> Triple:
    """Return one number per channel; image_std must be above zero."""
    value = config.get(key)
    value = default if value is None else value
    values = [value] * 3 if _is_number(value) else value
    if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(map(_is_number, values)):
        raise refusal(key, value, "three numbers")
    if key == "image_std" and min(values) <= 0:
        raise refusal(key, value, "above zero")
    return (float(values[0]), float(values[1]), float(values[2]))


def rescale_factor(config: Mapping[str, Any]) -> float:
    """Return the factor for pixel levels, by default 1 / 255."""
    value = config.get("rescale_factor")
    value = 1 / 255 if value is None else value
    if not _is_number(value) or value <= 0:
        raise refusal("rescale_factor", value, "a number above zero")
    return float(value)


def resample(config: Mapping[str, Any], default: int = int(Image.Resampling.BICUBIC)) -> int:
    """Return Pillow's number of the resampling filter."""
    value = config.get("resample")
    value = default if value is None else value
    known = {int(filter_) for filter_ in Image.Resampling}
    if not isinstance(value, int) or isinstance(value, bool) or value not in known:
        raise refusal("resample", value, f"Pillow's number of a filter ({min(known)} to {max(known)})")
    return int(value)


def refusal(key: str, value: object, wanted: str) -> BundleError:
    """Return the error for an unsupported setting."""
    message = f"The image processor's {key} is {value!r}, but must be {wanted}."
    return BundleError(message, hint="Check preprocessor_config.json.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
