"""The image processor of Pixtral and Mistral 3: one view of any size, bit-identical to that of transformers.

models/pixtral/image_processing_pil_pixtral.py: the image is shrunk, if it is larger, into the longest edge or into a height and a
width; its sides are then rounded up to full visual tokens. Both steps are one resize. transformers' processor of text and images
multiplies the patch by the side of a visual token before; here the settings have both, from the model's configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.errors import ImageError
from edgeprune.plan import Geometry
from edgeprune.processors.base import CLIP, PatchSpec, patch_settings, refuse_video, require_pixels
from edgeprune.processors.settings import refusal, require_off, sides, switch


@dataclass(frozen=True, kw_only=True)
class PixtralSpec(PatchSpec):
    """Pixtral: images are at most `height` x `width` pixels before their sides are rounded up."""

    height: int
    width: int

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> PixtralSpec:
        """Return the spec of the settings in a preprocessor_config.json; raise BundleError for unsupported ones."""
        require_off(settings, "do_center_crop")
        size = sides(settings, "size", {"longest_edge": 1024}, square=switch(settings, "default_to_square", True))
        if set(size) not in ({"longest_edge"}, {"height", "width"}):
            raise refusal("size", size, "longest_edge, or height and width")
        longest = size.get("longest_edge", 0)
        return cls(**patch_settings(settings, CLIP), height=size.get("height", longest), width=size.get("width", longest))

    def default_size(self) -> tuple[int, int] | None:
        """Return None: there is no default."""
        return None

    def geometry(self, height: int, width: int, frames: int = 1, fps: float = 0.0) -> Geometry:
        """Return the geometry of an image as one grid."""
        refuse_video(frames)
        return Geometry(*self._resized_size(height, width), self.patch, self.merge)

    def canvas(self, image: Image.Image, frames: int = 1) -> Image.Image:
        """Return the image resized to full visual tokens."""
        refuse_video(frames)
        return self.resized(image, *self._resized_size(image.height, image.width))

    def patches(self, frames: Sequence[Image.Image]) -> np.ndarray:
        """Return float32 patches [rows * columns, 3 * patch * patch] of an image, in reading order."""
        return self.cut([np.asarray(self.canvas(frames[0], len(frames)))])

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        require_pixels(height, width)
        inner, ratio = (height, width), max(height / self.height, width / self.width)
        if ratio > 1:
            inner = math.floor(height / ratio), math.floor(width / ratio)
        if min(inner) < 1:
            raise ImageError(f"A {width}x{height} image is too oblong: nothing would be left of it.", hint="Crop it or pad it.")
        unit = self.patch * self.merge
        return -(-inner[0] // unit) * unit, -(-inner[1] // unit) * unit
