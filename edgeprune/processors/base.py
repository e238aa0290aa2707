"""The interface of image processors, their shared conversion of views to patches, and `fit`, which adapts an image to a bundle."""

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
_MAX_ASPECT = 200  # the longer side divided by the shorter


class ImageSpec(Protocol):
    """The preprocessing of a model's images. Results agree with the transformers processor that the settings name."""

    @property
    def resample(self) -> int:
        """Pillow's number of the resampling filter."""
        ...

    @property
    def spatial(self) -> bool:
        """Whether every visual token corresponds to a place in the image."""
        ...

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ImageSpec:
        """Return the spec of the settings in a preprocessor_config.json; raise BundleError for unsupported ones."""
        ...

    def default_size(self) -> tuple[int, int] | None:
        """Return the default image size (height, width) in pixels, or None if the processor has none."""
        ...

    def geometry(self, height: int, width: int, frames: int = 1, fps: float = 0.0) -> Geometry:
        """Return the geometry of an image of this size in pixels, or of a video of such frames at `fps`.

        Images of other sizes may have the same views. Raises ImageError for an unsupported size or video.
        """
        ...

    def canvas(self, image: Image.Image, frames: int = 1) -> Image.Image:
        """Return the resized image or video frame whose pixels the boxes of the views refer to."""
        ...

    def patches(self, frames: Sequence[Image.Image]) -> np.ndarray:
        """Return float32 patches [patches, patch pixels] of one RGB image, or of the RGB frames of a video.

        Patches are ordered by view, then as the family's vision module expects. The pixels of a patch are in the order of the
        encoder's convolution: channel, (time,) row, column.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PatchSpec:
    """The base of processors that cut views into patches in reading order.

    `patch`: side of a patch in pixels. `merge`: side of a visual token in patches. `mean` and `std`: per channel.
    """

    patch: int
    merge: int
    mean: Triple
    std: Triple
    rescale_factor: float
    resample: int
    spatial: bool = True

    def resized(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """Return an RGB image resized to this size; raise ImageError for one of another mode."""
        return require_rgb(image).resize((width, height), Image.Resampling(self.resample))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of visual tokens in a view; pixels beyond the last full patch are dropped."""
        return height // self.patch // self.merge, width // self.patch // self.merge

    def view(self, top: int, left: int, height: int, width: int, time: int = 0) -> View:
        """Return the view of a box that the encoder takes without resizing."""
        return View(top, left, height, width, *self.grid(height, width), time=time)

    def tiled(self, rows: int, columns: int, height: int, width: int) -> list[View]:
        """Return the views of a grid of tiles of this size, row by row, and the overview last; a single tile has no other view."""
        overview = View(0, 0, rows * height, columns * width, *self.grid(height, width))
        tiles = [self.view(row * height, column * width, height, width) for row in range(rows) for column in range(columns)]
        return [*tiles, overview] if len(tiles) > 1 else [overview]

    def arranged(self, height: int, width: int, views: Sequence[View], frames: int = 1, fps: float = 0.0) -> Geometry:
        """Return the geometry of these views, without `views` if they equal the default layout."""
        plain = Geometry(height, width, self.patch, self.merge)
        if frames == 1 and plain.layout == tuple(views):
            return plain
        return Geometry(height, width, self.patch, self.merge, tuple(views), frames, fps if frames > 1 else 0.0)

    def cut(self, views: Sequence[np.ndarray]) -> np.ndarray:
        """Return float32 patches [patches, 3 * patch * patch] of equally large uint8 views [height, width, 3]."""
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
    """Return the tiles of this size, row by row, of an image [rows * height, columns * width, 3]."""
    tops, lefts = range(0, pixels.shape[0], height), range(0, pixels.shape[1], width)
    return [pixels[top : top + height, left : left + width] for top in tops for left in lefts]


def patch_settings(
    settings: Mapping[str, Any], colours: tuple[Triple, Triple], default: Image.Resampling = Image.Resampling.BICUBIC
) -> dict[str, Any]:
    """Return the fields of a PatchSpec; `colours` are the default mean and standard deviation.

    The settings must have `patch_size`, and `merge_size` unless it is 1. Families add both from the model's configuration.
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
    """Raise BundleError unless the full patches along a side of a view divide into visual tokens."""
    if side < patch:
        raise refusal("patch_size", patch, f"at most the size of a view ({side})")
    if side // patch % merge:
        raise refusal("merge_size", merge, f"a divisor of the {side // patch} patches along a view")


def require_pixels(height: int, width: int) -> None:
    """Raise ImageError for a size without pixels."""
    if min(height, width) < 1:
        raise ImageError(f"An image of {height}x{width} pixels is empty.", hint="Give an image with pixels in it.")


def require_aspect(height: int, width: int) -> None:
    """Raise ImageError for an aspect ratio above the limit."""
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise ImageError(f"A {height}x{width} image is too oblong: the limit is {_MAX_ASPECT}:1.", hint="Crop it or pad it.")


def require_rgb(image: Image.Image) -> Image.Image:
    """Return the image; raise ImageError for one of another mode."""
    if image.mode != "RGB":
        raise ImageError(f"Patches need an RGB image, not mode {image.mode}.", hint="Pass it through read_image first.")
    return image


def refuse_video(frames: int) -> None:
    """Raise ImageError for a video, for processors that take only images."""
    if frames != 1:
        raise ImageError(f"This model's image processor takes one image, not {frames} frames.", hint="Leave out --frames.")


def levels(rescale_factor: float, mean: Triple, std: Triple) -> np.ndarray:
    """Return the float32 table of normalized pixel levels [3, 256]; a lookup is faster than arithmetic on every pixel.

    As in transformers' Pillow processors, levels are rescaled in float64, rounded to float32 and normalized in float32.
    """
    scaled = (np.arange(256, dtype=np.float64) * rescale_factor).astype(np.float32)
    means, deviations = (np.array(channels, np.float32)[:, None] for channels in (mean, std))
    normalized: np.ndarray = (scaled - means) / deviations
    return normalized


def fit(image: Image.Image, geometry: Geometry, how: str, spec: ImageSpec) -> Image.Image:
    """Return an RGB image or video frame adapted to the views of `geometry`.

    `how`: "exact" returns the image unchanged if it has these views and raises ImageError otherwise; "stretch" resizes it to the
    size and ignores its aspect; "pad" keeps the aspect and adds grey bars. Raises BundleError if the processor never produces
    `geometry`, and UsageError for an unknown `how`.
    """
    if how not in FITS:
        raise UsageError(f"Unknown fit {how!r}.", hint=f"Fits are: {', '.join(FITS)}.")
    expected = spec.geometry(geometry.height, geometry.width, geometry.frames, geometry.fps)
    if expected != geometry:
        raise BundleError(
            f"The bundle takes {geometry}, which its image processor never makes: of such an image, that makes {expected}.",
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
            f"The bundle takes {geometry}, but this {image.height}x{image.width} image makes {own} (height x width).",
            hint="Give an image of that shape, or fit it: --fit pad (adds grey bars) or --fit stretch (distorts it); "
            'in Python fit="pad".',
        )
    return image


def _letterbox(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    width, height = size
    scale = min(width / image.width, height / image.height)
    inner = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)
    canvas = Image.new("RGB", size, _GREY)
    canvas.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    return canvas
