"""What all image processors have in common: from pictures to the patches that a vision encoder takes.

Bring an image to the geometry of a bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from edgeprune.errors import BundleError, ImageError, UsageError
from edgeprune.plan import Geometry, View
from edgeprune.processors.settings import Triple, positive, refusal, require_on, resample, rescale_factor, triple

CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

FITS = ("exact", "stretch", "pad")

_GREY = (128, 128, 128)
_MAX_ASPECT = 200  # the longer side by the shorter


class ImageSpec(Protocol):
    """How a model wants its images. Everything agrees with the processor in transformers that the settings name."""

    @property
    def resample(self) -> int:
        """Pillow's number of the filter."""
        ...

    @property
    def spatial(self) -> bool:
        """Whether a visual token stands for a place in the image."""
        ...

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ImageSpec:
        """Return the spec of a preprocessor_config.json; raise BundleError for what this runtime cannot honour."""
        ...

    def default_size(self) -> tuple[int, int] | None:
        """Return the one size (height, width) that images have where none is asked for; None where any would do."""
        ...

    def geometry(self, height: int, width: int, frames: int = 1, fps: float = 0.0) -> Geometry:
        """Return what an image of this size in pixels becomes, or a video of such frames; raise ImageError for one not taken.

        Images of other sizes that become the same views are taken as well.
        """
        ...

    def canvas(self, image: Image.Image, frames: int = 1) -> Image.Image:
        """Return the picture that the boxes of the views lie in, of an image or of one of a video's frames."""
        ...

    def patches(self, frames: Sequence[Image.Image]) -> np.ndarray:
        """Return float32 patches [patches, patch pixels] of the frames of a video, or of one image, which are RGB.

        View after view, and within one in the order that the family's vision module takes. The pixels of a patch are in the order
        of the encoder's convolution: channel, (time,) row, column.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PatchSpec:
    """What the processors share whose views are cut into patches in reading order.

    `patch`: pixels a side of a patch, `merge`: patches a side of a visual token; `mean` and `std` are per channel.
    """

    patch: int
    merge: int
    mean: Triple
    std: Triple
    rescale_factor: float
    resample: int
    spatial: bool = True

    def resized(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """Return an RGB image of this size; raise ImageError for one of another mode."""
        return require_rgb(image).resize((width, height), Image.Resampling(self.resample))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of visual tokens in a view; pixels that fill no patch are left out."""
        return height // self.patch // self.merge, width // self.patch // self.merge

    def view(self, top: int, left: int, height: int, width: int, time: int = 0) -> View:
        """Return the view of a box that the encoder sees in its own size."""
        return View(top, left, height, width, *self.grid(height, width), time=time)

    def tiled(self, rows: int, columns: int, height: int, width: int) -> list[View]:
        """Return the views of a grid of tiles of this size, row by row, and last of all of it; one tile is all of it."""
        every = View(0, 0, rows * height, columns * width, *self.grid(height, width))
        tiles = [self.view(row * height, column * width, height, width) for row in range(rows) for column in range(columns)]
        return [*tiles, every] if len(tiles) > 1 else [every]

    def arranged(self, height: int, width: int, views: Sequence[View], frames: int = 1, fps: float = 0.0) -> Geometry:
        """Return the geometry of these views."""
        plain = Geometry(height, width, self.patch, self.merge)
        if frames == 1 and plain.layout == tuple(views):
            return plain
        return Geometry(height, width, self.patch, self.merge, tuple(views), frames, fps if frames > 1 else 0.0)

    def cut(self, views: Sequence[np.ndarray]) -> np.ndarray:
        """Return float32 patches [patches, 3 * patch * patch] of uint8 views [height, width, 3] of one size."""
        side = self.patch
        rows, columns = views[0].shape[0] // side, views[0].shape[1] // side
        table = levels(self.rescale_factor, self.mean, self.std)
        patches = np.empty((len(views), rows, columns, 3, side, side), np.float32)
        for grid, view in zip(patches, views, strict=True):
            for channel in range(3):
                plane = table[channel][view[: rows * side, : columns * side, channel]]
                grid[:, :, channel] = plane.reshape(rows, side, columns, side).swapaxes(1, 2)
        return patches.reshape(-1, 3 * side * side)


def pieces(pixels: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """Return the tiles of this size, row by row, that an image [rows * height, columns * width, 3] consists of."""
    tops, lefts = range(0, pixels.shape[0], height), range(0, pixels.shape[1], width)
    return [pixels[top : top + height, left : left + width] for top in tops for left in lefts]


def patch_settings(
    settings: Mapping[str, Any], colours: tuple[Triple, Triple], default: Image.Resampling = Image.Resampling.BICUBIC
) -> dict[str, Any]:
    """Return the fields of a PatchSpec; `colours` are the mean and the deviation where the settings have none.

    The settings have `patch_size`, and `merge_size` unless it is 1: the family takes them from the model's configuration.
    """
    require_on(settings, "do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
    return {
        "patch": positive(settings, "patch_size"),
        "merge": positive(settings, "merge_size", 1),
        "mean": triple(settings, "image_mean", colours[0]),
        "std": triple(settings, "image_std", colours[1]),
        "rescale_factor": rescale_factor(settings),
        "resample": resample(settings, int(default)),
    }


def require_whole(side: int, patch: int, merge: int) -> None:
    """Raise BundleError unless a side of a view is whole visual tokens, but for pixels that fill no patch."""
    if side < patch:
        raise refusal("patch_size", patch, f"at most the size of a view ({side})")
    if side // patch % merge:
        raise refusal("merge_size", merge, f"a divisor of the {side // patch} patches along a view")


def require_pixels(height: int, width: int) -> None:
    """Raise ImageError for a size without pixels."""
    if min(height, width) < 1:
        raise ImageError(f"An image of {width}x{height} pixels is empty.", hint="Give an image with pixels in it.")


def require_aspect(height: int, width: int) -> None:
    """Raise ImageError for an image that is too oblong."""
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise ImageError(f"A {width}x{height} image is too oblong: the limit is {_MAX_ASPECT}:1.", hint="Crop it or pad it.")


def require_rgb(image: Image.Image) -> Image.Image:
    """Return the image; raise ImageError for one of another mode."""
    if image.mode != "RGB":
        raise ImageError(f"Patches need an RGB image, not mode {image.mode}.", hint="Pass it through read_image first.")
    return image


def refuse_video(frames: int) -> None:
    """Raise ImageError for a video, where a processor takes none."""
    if frames != 1:
        raise ImageError(f"This model's image processor takes one image, not {frames} frames.", hint="Leave out --frames.")


def levels(rescale_factor: float, mean: Triple, std: Triple) -> np.ndarray:
    """Return the normalized values of the 256 pixel levels [3, 256], float32: looking up is faster than arithmetic on every pixel.

    Rescaled in float64 and rounded to float32, then normalized in that, as transformers' Pillow processors do.
    """
    scaled = (np.arange(256, dtype=np.float64) * rescale_factor).astype(np.float32)
    means, deviations = (np.array(channels, np.float32)[:, None] for channels in (mean, std))
    normalized: np.ndarray = (scaled - means) / deviations
    return normalized


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
