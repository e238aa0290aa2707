"""The image processor of LFM2-VL: one view of any aspect, or tiles of one size and a thumbnail for large images.

It follows models/lfm2_vl/image_processing_lfm2_vl.py. An image is brought to whole visual tokens at its own aspect, within limits
on their number. If it has more pixels than `tolerance` times the limit, it is stretched to the grid of tiles nearest to its aspect,
and the view that it would have had becomes the thumbnail after the tiles. Of equally near grids the larger one is taken if the
image has more than half its pixels. The pixels of a patch are in the order row, column, channel, as the encoder's first layer takes
them.

Departure: upstream resizes with torchvision, this module with Pillow; levels differ by one at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.plan import Geometry, View
from edgeprune.processors.base import (
    HALF,
    PatchSpec,
    patch_settings,
    pieces,
    refuse_video,
    require_aspect,
    require_pixels,
    require_whole,
)
from edgeprune.processors.settings import positive, refusal, require_on, switch


@dataclass(frozen=True, kw_only=True)
class NaflexSpec(PatchSpec):
    """LFM2-VL: `least` and `most` visual tokens of a view; `tile`: side of a tile in pixels.

    Without `splits` every image is one view. A split image has `fewest_tiles` to `most_tiles` tiles, and with `thumbnail` a view of
    the whole. `tolerance`: how many times the pixels of `most` tokens an image may have and still be one view.
    """

    least: int
    most: int
    tile: int
    splits: bool
    fewest_tiles: int
    most_tiles: int
    thumbnail: bool
    tolerance: float

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> NaflexSpec:
        """Return the spec of the settings in a preprocessor_config.json; raise BundleError for unsupported ones.

        With `fixed_size` [height, width], if that is a size of one view, every image of its aspect is brought to it.
        """
        require_on(settings, "do_pad")
        patches = {
            "patch_size": positive(settings, "encoder_patch_size", 16),
            "merge_size": positive(settings, "downsample_factor", 2),
        }
        shared = patch_settings({**settings, **patches}, HALF, Image.Resampling.BILINEAR)
        least, most = positive(settings, "min_image_tokens", 64), positive(settings, "max_image_tokens", 256)
        tile = positive(settings, "tile_size", 512)
        fewest_tiles, most_tiles = positive(settings, "min_tiles", 2), positive(settings, "max_tiles", 10)
        tolerance = settings.get("max_pixels_tolerance", 2.0)
        if least > most:
            raise refusal("min_image_tokens", least, f"max_image_tokens ({most}) or less")
        if fewest_tiles > most_tiles:
            raise refusal("min_tiles", fewest_tiles, f"max_tiles ({most_tiles}) or less")
        if not isinstance(tolerance, (int, float)) or isinstance(tolerance, bool) or not 0 < tolerance < math.inf:
            raise refusal("max_pixels_tolerance", tolerance, "a number above zero")
        require_whole(tile, shared["patch"], shared["merge"])
        spec = cls(
            **shared,
            least=least,
            most=most,
            tile=tile,
            splits=switch(settings, "do_image_splitting", True) and most_tiles > 1,
            fewest_tiles=fewest_tiles,
            most_tiles=most_tiles,
            thumbnail=switch(settings, "use_thumbnail", True),
            tolerance=float(tolerance),
        )
        fixed = settings.get("fixed_size")
        return spec if fixed is None else spec._fixed(*fixed)

    def default_size(self) -> tuple[int, int] | None:
        """Return a square if images have one number of visual tokens and it is a square, else None."""
        side = math.isqrt(self.most)
        return (side * self._unit,) * 2 if not self.splits and self.least == self.most == side**2 else None

    def geometry(self, height: int, width: int, frames: int = 1, fps: float = 0.0) -> Geometry:
        """Return the geometry of an image: one view, or its tiles and thumbnail."""
        refuse_video(frames)
        size = self._scaled(height, width)
        if not self._is_split(height, width):
            return self.arranged(*size, [self.view(0, 0, *size)])
        rows, columns = self._tiles(height, width)
        tiles = [
            self.view(row * self.tile, column * self.tile, self.tile, self.tile) for row in range(rows) for column in range(columns)
        ]
        whole = View(0, 0, rows * self.tile, columns * self.tile, *self.grid(*size))
        return self.arranged(height, width, [*tiles, whole] if self.thumbnail and len(tiles) > 1 else tiles)

    def canvas(self, image: Image.Image, frames: int = 1) -> Image.Image:
        """Return the image resized to its view, or stretched to its grid of tiles."""
        refuse_video(frames)
        if not self._is_split(image.height, image.width):
            return self.resized(image, *self._scaled(image.height, image.width))
        rows, columns = self._tiles(image.height, image.width)
        return self.resized(image, rows * self.tile, columns * self.tile)

    def patches(self, frames: Sequence[Image.Image]) -> np.ndarray:
        """Return float32 patches [patches of all views, patch * patch * 3]."""
        canvas = self.canvas(frames[0], len(frames))
        image = frames[0]
        if not self._is_split(image.height, image.width):
            return self._channels_last(self.cut([np.asarray(canvas)]))
        tiles = pieces(np.asarray(canvas), self.tile, self.tile)
        cut = [self.cut(tiles)]
        if self.thumbnail and len(tiles) > 1:
            cut.append(self.cut([np.asarray(self.resized(image, *self._scaled(image.height, image.width)))]))
        return self._channels_last(np.concatenate(cut))

    def _channels_last(self, patches: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(patches.reshape(-1, 3, self.patch**2).swapaxes(1, 2)).reshape(patches.shape)

    @property
    def _unit(self) -> int:
        return self.patch * self.merge

    def _fixed(self, height: int, width: int) -> NaflexSpec:
        if min(height, width) < 1 or self._is_split(height, width) or self._scaled(height, width) != (height, width):
            return self
        tokens = height * width // self._unit**2
        return replace(self, least=tokens, most=tokens, splits=False)

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        # The size of an image as one view. round() rounds halves to even, as upstream does.
        require_pixels(height, width)
        require_aspect(height, width)
        unit, least, most = self._unit, self.least * self._unit**2, self.most * self._unit**2
        rows, columns = (max(1, round(side / unit)) for side in (height, width))
        if rows * columns * unit**2 > most:
            shrink = math.sqrt(height * width / most)
            rows, columns = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
        elif rows * columns * unit**2 < least:
            enlarge = math.sqrt(least / (height * width))
            rows, columns = (math.ceil(side * enlarge / unit) for side in (height, width))
        return rows * unit, columns * unit

    def _is_split(self, height: int, width: int) -> bool:
        require_pixels(height, width)
        rows, columns = (max(self.patch, round(side / self._unit) * self._unit) for side in (height, width))
        return self.splits and rows * columns > self.most * self._unit**2 * self.tolerance

    def _tiles(self, height: int, width: int) -> tuple[int, int]:
        best, nearest = (1, 1), math.inf
        for columns, rows in self._grids():
            distance = abs(width / height - columns / rows)
            large = height * width > 0.5 * self.tile**2 * columns * rows
            if distance < nearest or (distance == nearest and large):
                best, nearest = (rows, columns), distance
        return best

    def _grids(self) -> list[tuple[int, int]]:
        # (columns, rows). Upstream sorts a set by the number of tiles, so that equal counts come in the order of the set.
        counts = range(self.fewest_tiles, self.most_tiles + 1)
        sides = range(1, self.most_tiles + 1)
        grids = {
            (columns, rows)
            for count in counts
            for columns in sides[:count]
            for rows in sides[:count]
            if self.fewest_tiles <= columns * rows <= self.most_tiles
        }
        return sorted(grids, key=lambda grid: grid[0] * grid[1])
