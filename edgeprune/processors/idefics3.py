"""Idefics3's image processor, and SmolVLM's: tiles of one size row by row, and the whole image last.

Bit for bit what transformers does in models/idefics3/image_processing_pil_idefics3.py and in SmolVLM's copy: the image is brought
to its longest edge, from there to whole tiles, and from there to the overview; each step rounds to whole levels. Without
splitting, or where one tile is all, the overview is the only view.

A frame of a video is an image without splitting, as in models/smolvlm/video_processing_smolvlm.py, where `size` goes before
`video_sampling`. Departure: that one resizes with torchvision, this one with Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.plan import Geometry
from edgeprune.processors.base import HALF, PatchSpec, patch_settings, pieces, refuse_video, require_pixels, require_whole
from edgeprune.processors.settings import plain_name, refusal, require_on, sides, switch

MAX_EDGE = 4096
_IDEFICS3, _SMOLVLM = "Idefics3ImageProcessor", "SmolVLMImageProcessor"


@dataclass(frozen=True, kw_only=True)
class Idefics3Spec(PatchSpec):
    """`longest`: to what the longest edge is brought first; `tile`: the sides of a tile, both in pixels."""

    longest: int
    tile: int
    splits: bool
    videos: bool = False

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Idefics3Spec:
        """Return the spec in a preprocessor_config.json; raise BundleError for what this runtime cannot honour."""
        require_on(settings, "do_pad")
        shared = patch_settings(settings, HALF, Image.Resampling.LANCZOS)
        longest, tile = _longest(settings, "size", 4 * 364), _longest(settings, "max_image_size", 364)
        require_whole(tile, shared["patch"], shared["merge"])
        splits = switch(settings, "do_image_splitting", True)
        videos = plain_name(settings, _IDEFICS3) == _SMOLVLM
        return cls(**shared, longest=longest, tile=tile, splits=splits, videos=videos)

    def default_size(self) -> tuple[int, int] | None:
        """Return the size of a tile where there is only one."""
        return None if self.splits and min(self.longest, MAX_EDGE) > self.tile else (self.tile, self.tile)

    def geometry(self, height: int, width: int, frames: int = 1, fps: float = 0.0) -> Geometry:
        """Return the tiles of an image and its overview, or the frames of a video."""
        if not self.videos:
            refuse_video(frames)
        require_pixels(height, width)
        if frames > 1:
            views = [self.view(0, 0, self.tile, self.tile, time) for time in range(frames)]
            return self.arranged(height, width, views, frames, fps)
        return self.arranged(height, width, self.tiled(*self._tiles(height, width), self.tile, self.tile))

    def canvas(self, image: Image.Image, frames: int = 1) -> Image.Image:
        """Return the image brought to whole tiles; of a video, the frame brought to one."""
        require_pixels(image.height, image.width)
        rows, columns = self._tiles(image.height, image.width) if frames == 1 else (1, 1)
        first = self.resized(image, *self._scaled(image.height, image.width))
        return self.resized(first, rows * self.tile, columns * self.tile)

    def patches(self, frames: Sequence[Image.Image]) -> np.ndarray:
        """Return float32 patches [patches of all views, 3 * patch * patch]."""
        if not self.videos:
            refuse_video(len(frames))
        canvases = [self.canvas(frame, len(frames)) for frame in frames]
        whole = [np.asarray(self.resized(canvas, self.tile, self.tile)) for canvas in canvases]
        tiles = pieces(np.asarray(canvases[0]), self.tile, self.tile)
        return self.cut([*tiles, *whole] if len(tiles) > 1 else whole)

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        # To the longest edge, the other one to an even number, and then below the limit of all.
        height, width = _longer_to(self.longest, height, width, even=True)
        return _longer_to(MAX_EDGE, height, width) if max(height, width) > MAX_EDGE else (height, width)

    def _tiles(self, height: int, width: int) -> tuple[int, int]:
        if not self.splits:
            return 1, 1
        height, width = self._scaled(height, width)
        longer = math.ceil(max(height, width) / self.tile) * self.tile
        height, width = _longer_to(longer, height, width)
        return math.ceil(height / self.tile), math.ceil(width / self.tile)


def _longer_to(longer: int, height: int, width: int, *, even: bool = False) -> tuple[int, int]:
    # In the very order of the roundings upstream.
    aspect = width / height
    other = int(longer / aspect) if width >= height else int(longer * aspect)
    other = max(1, other + other % 2 if even else other)
    return (other, longer) if width >= height else (longer, other)


def _longest(settings: Mapping[str, Any], key: str, default: int) -> int:
    size = sides(settings, key, {"longest_edge": default}, square=True)
    if set(size) != {"longest_edge"}:
        raise refusal(key, size, "longest_edge")
    return size["longest_edge"]
