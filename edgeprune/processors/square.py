"""The image processors of CLIP, SigLIP, Gemma 3 and LLaVA, which make one view of a fixed size.

They are bit-identical to those of transformers: models/clip/image_processing_pil_clip.py (resize of the shorter edge, center crop),
models/siglip/image_processing_pil_siglip.py and models/gemma3/image_processing_pil_gemma3.py (stretch), and
models/llava/image_processing_pil_llava.py (as CLIP, optionally after padding to a square with bars of the mean colour). A crop
larger than the image is filled with black. Departure: very oblong images, whose intermediate size would be huge, are refused, and
so is Gemma 3's pan and scan, which adds crops to oblong images.

Mantis drops the first patch of SigLIP as if it were a class token: `drop_first_patch`, which its family sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.errors import ImageError
from edgeprune.plan import Geometry
from edgeprune.processors.base import (
    CLIP,
    HALF,
    PatchSpec,
    patch_settings,
    refuse_video,
    require_aspect,
    require_pixels,
    require_rgb,
    require_whole,
)
from edgeprune.processors.settings import plain_name, refusal, require_off, sides, switch

MAX_SIDE = 16384  # of the padded square, in pixels
_CLIP, _SIGLIP, _LLAVA = "CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor"
_GEMMA = "Gemma3ImageProcessor"
_STRETCHING = (_SIGLIP, _GEMMA)
_BILINEAR, _BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


@dataclass(frozen=True, kw_only=True)
class SquareSpec(PatchSpec):
    """CLIP, SigLIP, Gemma 3 and LLaVA: the view is a center crop of `height` x `width` pixels from the resized image.

    `whole`: the size (height, width) to stretch the image to, or the length of its shorter edge. `squared`: pad to a square first.
    `headless`: the first patch makes no visual token; the rest of its row is a view of its own.
    """

    height: int
    width: int
    whole: tuple[int, int] | int
    squared: bool = False
    headless: bool = False

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> SquareSpec:
        """Return the spec of the settings in a preprocessor_config.json; raise BundleError for unsupported ones."""
        kind = plain_name(settings, _CLIP)
        require_off(settings, "use_square_size", "do_pan_and_scan", *(() if kind == _LLAVA else ("do_pad",)))
        target = _resize_target(settings, kind)
        height, width = _crop_size(settings, kind, target)
        shared = patch_settings(settings, HALF if kind in _STRETCHING else CLIP, _BILINEAR if kind == _GEMMA else _BICUBIC)
        for side in (height, width):
            require_whole(side, shared["patch"], shared["merge"])
        squared, headless = kind == _LLAVA and switch(settings, "do_pad", False), switch(settings, "drop_first_patch", False)
        return cls(**shared, height=height, width=width, whole=target, squared=squared, headless=headless)

    def default_size(self) -> tuple[int, int] | None:
        """Return the size of the view."""
        return self.height, self.width

    def geometry(self, height: int, width: int, frames: int = 1, fps: float = 0.0) -> Geometry:
        """Return the geometry of the single view, the same for all images."""
        refuse_video(frames)
        self._require_size(height, width)
        if not self.headless:
            return self.arranged(height, width, [self.view(0, 0, self.height, self.width)])
        side = self.patch * self.merge
        beside, below = self.view(0, side, side, self.width - side), self.view(side, 0, self.height - side, self.width)
        return self.arranged(height, width, [view for view in (beside, below) if view.tokens])

    def canvas(self, image: Image.Image, frames: int = 1) -> Image.Image:
        """Return the view as an image."""
        self._require_size(image.height, image.width)
        padded = self._with_bars(require_rgb(image)) if self.squared else image
        resized = self.resized(padded, *self._resized_size(padded))
        top, left = (resized.height - self.height) // 2, (resized.width - self.width) // 2
        return resized.crop((left, top, left + self.width, top + self.height))  # Pillow fills with black outside the image

    def patches(self, frames: Sequence[Image.Image]) -> np.ndarray:
        """Return float32 patches [rows * columns, 3 * patch * patch] of an image."""
        refuse_video(len(frames))
        return self.cut([np.asarray(self.canvas(frames[0]))])

    def _require_size(self, height: int, width: int) -> None:
        require_pixels(height, width)
        if self.squared and max(height, width) > MAX_SIDE:
            raise ImageError(
                f"A {height}x{width} image makes too large a square: the limit is {MAX_SIDE} pixels.", hint="Shrink it."
            )
        if isinstance(self.whole, int) and not self.squared:
            require_aspect(height, width)

    def _resized_size(self, image: Image.Image) -> tuple[int, int]:
        if isinstance(self.whole, tuple):
            return self.whole
        longer = int(self.whole * max(image.size) / min(image.size))
        return (longer, self.whole) if image.width <= image.height else (self.whole, longer)

    def _with_bars(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        red, green, blue = (int(channel * 255) for channel in self.mean)
        square = Image.new("RGB", (side, side), (red, green, blue))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


def _resize_target(settings: Mapping[str, Any], kind: str) -> tuple[int, int] | int:
    default = {"height": 224, "width": 224} if kind in _STRETCHING else {"shortest_edge": 224}
    size = sides(settings, "size", default, square=switch(settings, "default_to_square", kind == _GEMMA))
    if set(size) == {"height", "width"}:
        return size["height"], size["width"]
    if set(size) == {"shortest_edge"}:
        return size["shortest_edge"]
    raise refusal("size", size, "shortest_edge, or height and width")


def _crop_size(settings: Mapping[str, Any], kind: str, target: tuple[int, int] | int) -> tuple[int, int]:
    if switch(settings, "do_center_crop", kind not in _STRETCHING):
        crop = sides(settings, "crop_size", {} if kind in _STRETCHING else {"height": 224, "width": 224}, square=True)
        if set(crop) != {"height", "width"}:
            raise refusal("crop_size", crop, "height and width")
        return crop["height"], crop["width"]
    if isinstance(target, int):
        raise refusal("size", {"shortest_edge": target}, "height and width, since nothing is cropped")
    return target
