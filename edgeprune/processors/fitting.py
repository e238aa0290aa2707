"""Bring an image to the geometry of a bundle."""

from __future__ import annotations

from PIL import Image

from edgeprune.errors import BundleError, ImageError, UsageError
from edgeprune.plan import Geometry
from edgeprune.processors.base import ImageSpec

FITS = ("exact", "stretch", "pad")

_GREY = (128, 128, 128)


def fit(image: Image.Image, geometry: Geometry, how: str, spec: ImageSpec) -> Image.Image:
    """Return an RGB image that becomes the views of `geometry`; of a video, a frame of it.

    `how`: "exact" returns the image itself when it becomes those views and raises ImageError otherwise, "stretch" resizes it
    without regard to its aspect, "pad" keeps the aspect and fills up with grey bars.
    """
    if how not in FITS:
        raise UsageError(f"Unknown fit {how!r}.", hint=f"Fits are: {', '.join(FITS)}.")
    made = spec.geometry(geometry.height, geometry.width, geometry.frames, geometry.fps)
    if made != geometry:
        raise BundleError(
            f"The bundle takes {geometry}, which its image processor never makes: of such an image, that makes {made}.",
            hint="Export the bundle again for a size that it does make.",
        )
    size, resample = (geometry.width, geometry.height), Image.Resampling(spec.resample)
    if how == "stretch":
        return image.resize(size, resample)
    if how == "pad":
        return _letterbox(image, size, resample)
    own = spec.geometry(image.height, image.width, geometry.frames, geometry.fps)
    if own.layout != geometry.layout:
        raise ImageError(
            f"The bundle takes {geometry}, but this {image.width}x{image.height} image makes {own}.",
            hint='Give an image of that shape, or choose "stretch" (distorts it) or "pad" (adds grey bars) instead of "exact".',
        )
    return image


def _letterbox(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    width, height = size
    scale = min(width / image.width, height / image.height)
    inner = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)
    canvas = Image.new("RGB", size, _GREY)
    canvas.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    return canvas
