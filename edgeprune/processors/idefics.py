"""The image processors of Idefics2, Idefics3 and SmolVLM, bit-identical to those of transformers.

Idefics2 (models/idefics2/image_processing_pil_idefics2.py): the image at its own aspect within limits, preceded by its quarters if
splitting is on. Quarters are cropped first. Each view is then resized separately, down to the longest edge and up to the shortest.
A perceiver turns every view into the same number of visual tokens, which have no place in the image. The encoder takes every view
in the size of the last view's box, in full patches. Departure: upstream pads views of different sizes with zeros and masks these in
attention; the graphs have no mask, so such images are refused.

Idefics3 and SmolVLM (models/idefics3/image_processing_pil_idefics3.py and SmolVLM's copy): tiles of one size row by row, and the
overview last. The image is resized to the longest edge, then to a multiple of the tile, then to the overview; each step rounds to
integer levels. Without splitting, or with a single tile, the overview is the only view. A video frame is processed like an image
without splitting, as in models/smolvlm/video_processing_smolvlm.py, where `size` takes precedence over `video_sampling`. Departure:
upstream resizes frames with torchvision, this module with Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.errors import ImageError
from edgeprune.plan import Geometry, View
from edgeprune.processors.base import (
    HALF,
    PatchSpec,
    patch_settings,
    pieces,
    refuse_video,
    require_pixels,
    require_rgb,
    require_whole,
)
from edgeprune.processors.settings import plain_name, positive, refusal, require_on, sides, switch

MAX_EDGE = 4096
_IDEFICS3, _SMOLVLM = "Idefics3ImageProcessor", "SmolVLMImageProcessor"


@dataclass(frozen=True, kw_only=True)
class Idefics2Spec(PatchSpec):
    """Idefics2: `shortest` and `longest` edge in pixels, or a `fixed` size (height, width); `latents`: visual tokens per view."""

    shortest: int
    longest: int
    fixed: tuple[int, int] | None
    splits: bool
    latents: int
    spatial: bool = False

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Idefics2Spec:
        """Return the spec of the settings in a preprocessor_config.json; raise BundleError for unsupported ones.

        The settings also have `latents`, from the configuration of the model's perceiver.
        """
        require_on(settings, "do_pad")
        size = sides(
            settings, "size", {"shortest_edge": 378, "longest_edge": 980}, square=switch(settings, "default_to_square", False)
        )
        fixed = (size["height"], size["width"]) if set(size) == {"height", "width"} else None
        if fixed is None and set(size) != {"shortest_edge", "longest_edge"}:
            raise refusal("size", size, "shortest_edge and longest_edge, or height and width")
        if fixed is None and size["shortest_edge"] > size["longest_edge"]:
            raise refusal("shortest_edge", size["shortest_edge"], f"longest_edge ({size['longest_edge']}) or less")
        shared = patch_settings(settings, HALF, Image.Resampling.BILINEAR)
        if shared["merge"] != 1:
            raise refusal("merge_size", shared["merge"], "1")
        require_whole(min(size.values()), shared["patch"], 1)
        return cls(
            **shared,
            shortest=min(size.values()),
            longest=max(size.values()),
            fixed=fixed,
            splits=switch(settings, "do_image_splitting", False),
            latents=positive(settings, "latents"),
        )

    def default_size(self) -> tuple[int, int] | None:
        """Return the fixed size of every view, if there is one."""
        return self.fixed

    def geometry(self, height: int, width: int, frames: int = 1, fps: float = 0.0) -> Geometry:
        """Return the geometry of an image: its quarters, if it is split, and the overview."""
        refuse_video(frames)
        rows, columns = self._view_size(height, width)
        overview = View(0, 0, rows, columns, 1, self.latents)
        if not self.splits:
            return self.arranged(height, width, [overview])
        tops, lefts = (0, rows // 2, rows), (0, columns // 2, columns)
        quarters = [
            View(tops[row], lefts[column], tops[row + 1] - tops[row], lefts[column + 1] - lefts[column], 1, self.latents)
            for row in (0, 1)
            for column in (0, 1)
        ]
        return self.arranged(height, width, [*quarters, overview])

    def canvas(self, image: Image.Image, frames: int = 1) -> Image.Image:
        """Return the image resized to the overview."""
        return self.resized(image, *self._view_size(image.height, image.width))

    def patches(self, frames: Sequence[Image.Image]) -> np.ndarray:
        """Return float32 patches [patches of all views, 3 * patch * patch]."""
        refuse_video(len(frames))
        image = require_rgb(frames[0])
        size = self._view_size(image.height, image.width)
        middle, bottom = image.width // 2, image.height // 2
        boxes = [(0, 0, middle, bottom), (middle, 0, image.width, bottom)]
        boxes += [(left, bottom, right, image.height) for left, _, right, _ in boxes]
        views = [*(image.crop(box) for box in boxes), image] if self.splits else [image]
        return self.cut([np.asarray(self.resized(view, *size)) for view in views])

    def _view_size(self, height: int, width: int) -> tuple[int, int]:
        # The common size of all views; raises ImageError if sizes differ.
        require_pixels(height, width)
        size = self._scaled(height, width)
        if self.splits and not self._equal_sizes(height, width):
            raise ImageError(
                f"The quarters of a {height}x{width} image become other sizes than the whole, which is not supported.",
                hint="Export the bundle for a size that works, and stretch images to it.",
            )
        return size

    def _equal_sizes(self, height: int, width: int) -> bool:
        if min(height, width) < 2:
            return False
        rows, columns = {height // 2, -(-height // 2)}, {width // 2, -(-width // 2)}
        return {self._scaled(row, column) for row in rows for column in columns} == {self._scaled(height, width)}

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        if self.fixed is not None:
            return self.fixed
        aspect = width / height
        if width >= height and width > self.longest:
            height, width = int(self.longest / aspect), self.longest
        elif height > width and height > self.longest:
            height, width = self.longest, int(self.longest * aspect)
        return max(height, self.shortest), max(width, self.shortest)


@dataclass(frozen=True, kw_only=True)
class Idefics3Spec(PatchSpec):
    """Idefics3 and SmolVLM: `longest`: length of the longest edge before tiling; `tile`: side of a tile, both in pixels."""

    longest: int
    tile: int
    splits: bool
    videos: bool = False

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Idefics3Spec:
        """Return the spec of the settings in a preprocessor_config.json; raise BundleError for unsupported ones."""
        require_on(settings, "do_pad")
        shared = patch_settings(settings, HALF, Image.Resampling.LANCZOS)
        longest, tile = _longest_edge(settings, "size", 4 * 364), _longest_edge(settings, "max_image_size", 364)
        require_whole(tile, shared["patch"], shared["merge"])
        splits = switch(settings, "do_image_splitting", True)
        videos = plain_name(settings, _IDEFICS3) == _SMOLVLM
        return cls(**shared, longest=longest, tile=tile, splits=splits, videos=videos)

    def default_size(self) -> tuple[int, int] | None:
        """Return the size of a tile if images never have more than one."""
        return None if self.splits and min(self.longest, MAX_EDGE) > self.tile else (self.tile, self.tile)

    def geometry(self, height: int, width: int, frames: int = 1, fps: float = 0.0) -> Geometry:
        """Return the geometry of an image's tiles and overview, or of a video's frames."""
        if not self.videos:
            refuse_video(frames)
        require_pixels(height, width)
        if frames > 1:
            views = [self.view(0, 0, self.tile, self.tile, time) for time in range(frames)]
            return self.arranged(height, width, views, frames, fps)
        return self.arranged(height, width, self.tiled(*self._tiles(height, width), self.tile, self.tile))

    def canvas(self, image: Image.Image, frames: int = 1) -> Image.Image:
        """Return the image resized to a multiple of the tile, or a video frame resized to one tile."""
        require_pixels(image.height, image.width)
        rows, columns = self._tiles(image.height, image.width) if frames == 1 else (1, 1)
        first = self.resized(image, *self._scaled(image.height, image.width))
        return self.resized(first, rows * self.tile, columns * self.tile)

    def patches(self, frames: Sequence[Image.Image]) -> np.ndarray:
        """Return float32 patches [patches of all views, 3 * patch * patch]."""
        if not self.videos:
            refuse_video(len(frames))
        canvases = [self.canvas(frame, len(frames)) for frame in frames]
        overviews = [np.asarray(self.resized(canvas, self.tile, self.tile)) for canvas in canvases]
        tiles = pieces(np.asarray(canvases[0]), self.tile, self.tile)
        return self.cut([*tiles, *overviews] if len(tiles) > 1 else overviews)

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        # Scale to the longest edge, the other edge to an even number, and then to the global limit.
        height, width = _scaled_to(self.longest, height, width, even=True)
        return _scaled_to(MAX_EDGE, height, width) if max(height, width) > MAX_EDGE else (height, width)

    def _tiles(self, height: int, width: int) -> tuple[int, int]:
        if not self.splits:
            return 1, 1
        height, width = self._scaled(height, width)
        longer = math.ceil(max(height, width) / self.tile) * self.tile
        height, width = _scaled_to(longer, height, width)
        return math.ceil(height / self.tile), math.ceil(width / self.tile)


def _scaled_to(longer: int, height: int, width: int, *, even: bool = False) -> tuple[int, int]:
    # The order of the roundings is that of upstream.
    aspect = width / height
    other = int(longer / aspect) if width >= height else int(longer * aspect)
    other = max(1, other + other % 2 if even else other)
    return (other, longer) if width >= height else (longer, other)


def _longest_edge(settings: Mapping[str, Any], key: str, default: int) -> int:
    size = sides(settings, key, {"longest_edge": default}, square=True)
    if set(size) != {"longest_edge"}:
        raise refusal(key, size, "longest_edge")
    return size["longest_edge"]
