"""GotOcr2's image processor, which InternVL3 uses: the grid of tiles nearest to the image's aspect, and an overview last.

Bit for bit what transformers does in models/got_ocr2/image_processing_pil_got_ocr2.py: the image is stretched to the grid, and on
its own to the overview; a grid of one tile has none. Of equally near grids the larger one wins while the image has more than half
its pixels. InternVL's processor switches `crop_to_patches` on, whatever preprocessor_config.json says: its family does.

A frame of a video is stretched to one tile, as in models/internvl/video_processing_internvl.py. Departure: that one resizes with
torchvision, this one with Pillow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.plan import Geometry
from edgeprune.processors.base import CLIP, PatchSpec, patch_settings, pieces, require_pixels, require_whole
from edgeprune.processors.settings import positive, refusal, sides, switch


@dataclass(frozen=True, kw_only=True)
class TileSpec(PatchSpec):
    """`height` and `width` of a tile in pixels; there are at least `fewest` and at most `most` of them."""

    height: int
    width: int
    fewest: int
    most: int

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> TileSpec:
        """Return the spec in a preprocessor_config.json; raise BundleError for what this runtime cannot honour."""
        size = sides(settings, "size", {"height": 384, "width": 384}, square=switch(settings, "default_to_square", True))
        if set(size) != {"height", "width"}:
            raise refusal("size", size, "height and width")
        shared = patch_settings(settings, CLIP)
        for side in size.values():
            require_whole(side, shared["patch"], shared["merge"])
        fewest, most = positive(settings, "min_patches", 1), positive(settings, "max_patches", 12)
        if not switch(settings, "crop_to_patches", False) or most == 1:
            fewest = most = 1
        if fewest > most:
            raise refusal("min_patches", fewest, f"max_patches ({most}) or less")
        return cls(**shared, height=size["height"], width=size["width"], fewest=fewest, most=most)

    def default_size(self) -> tuple[int, int] | None:
        """Return the size of a tile where there is only one."""
        return (self.height, self.width) if self.most == 1 else None

    def geometry(self, height: int, width: int, frames: int = 1, fps: float = 0.0) -> Geometry:
        """Return the tiles of an image and its overview, or the frames of a video."""
        require_pixels(height, width)
        if frames > 1:
            views = [self.view(0, 0, self.height, self.width, time) for time in range(frames)]
            return self.arranged(height, width, views, frames, fps)
        return self.arranged(height, width, self.tiled(*self._tiles(height, width), self.height, self.width))

    def canvas(self, image: Image.Image, frames: int = 1) -> Image.Image:
        """Return the image stretched to its tiles; of a video, the frame stretched to one."""
        require_pixels(image.height, image.width)
        rows, columns = self._tiles(image.height, image.width) if frames == 1 else (1, 1)
        return self.resized(image, rows * self.height, columns * self.width)

    def patches(self, frames: Sequence[Image.Image]) -> np.ndarray:
        """Return float32 patches [patches of all views, 3 * patch * patch]."""
        if len(frames) > 1:
            return self.cut([np.asarray(self.canvas(frame, len(frames))) for frame in frames])
        tiles = pieces(np.asarray(self.canvas(frames[0])), self.height, self.width)
        overview = [np.asarray(self.resized(frames[0], self.height, self.width))] if len(tiles) > 1 else []
        return self.cut([*tiles, *overview])

    def _tiles(self, height: int, width: int) -> tuple[int, int]:
        best, nearest = (1, 1), float("inf")
        for rows, columns in self._grids():
            distance = abs(width / height - columns / rows)
            roomy = height * width > 0.5 * self.height * self.width * columns * rows
            if distance < nearest or (distance == nearest and roomy):
                best, nearest = (rows, columns), distance
        return best

    def _grids(self) -> list[tuple[int, int]]:
        # Fewest tiles first, and of as many the narrowest: ties are broken in this order.
        counts = range(1, self.most + 1)
        grids = [(rows, columns) for columns in counts for rows in counts if self.fewest <= rows * columns <= self.most]
        return sorted(grids, key=lambda grid: grid[0] * grid[1])
