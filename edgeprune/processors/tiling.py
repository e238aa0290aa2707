"""The tiling image processors of GotOcr2, which InternVL3 uses, and of LLaVA-NeXT and -OneVision, bit-identical to transformers'.

GotOcr2 (models/got_ocr2/image_processing_pil_got_ocr2.py): the grid of tiles nearest to the image's aspect, and an overview last.
The image is stretched to the grid, and separately to the overview; a grid of one tile has no overview. Of equally near grids the
larger one is taken if the image has more than half its pixels. InternVL always enables `crop_to_patches`: its family sets it. A
video frame is stretched to one tile, as in models/internvl/video_processing_internvl.py.

LLaVA-OneVision (models/llava_onevision/image_processing_pil_llava_onevision.py): an overview first, and tiles of the image at the
best of several resolutions (pinpoints), the one that keeps most of the image and wastes least. The image is resized to it with its
aspect and black bars. The encoder takes the overview and then the tiles, row by row. There are fewer visual tokens than patches
(LlavaOnevisionModel.pack_image_features): after the overview's, one grid of all tiles without the rows or columns of the bars, with
a newline after every row. The grid is shrunk if its tokens exceed the number of tiles in `vision_aspect_ratio`. Both views have the
same box, the picture without bars. Video frames are stretched to overviews, whose tokens are halved along each side, and one
newline ends the video (get_video_features).

LLaVA-NeXT (models/llava_next/image_processing_pil_llava_next.py) has the same views and never shrinks the grid. It takes no videos.
Its center crop is of the size of a tile and changes nothing.

Departure: upstream resizes video frames with torchvision, this module with Pillow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.errors import ImageError
from edgeprune.plan import Geometry, View
from edgeprune.processors.base import CLIP, PatchSpec, patch_settings, pieces, require_pixels, require_whole
from edgeprune.processors.settings import plain_name, positive, refusal, require_off, sides, switch

_NEXT, _ONEVISION = "LlavaNextImageProcessor", "LlavaOnevisionImageProcessor"
_SIDES = range(384, 2305, 384)
_PINPOINTS = {
    _NEXT: [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    _ONEVISION: [[height, width] for height in _SIDES for width in _SIDES],
}


@dataclass(frozen=True, kw_only=True)
class TileSpec(PatchSpec):
    """GotOcr2: `height` and `width` of a tile in pixels; an image has at least `fewest` and at most `most` tiles."""

    height: int
    width: int
    fewest: int
    most: int

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> TileSpec:
        """Return the spec of the settings in a preprocessor_config.json; raise BundleError for unsupported ones."""
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
        """Return the size of a tile if images never have more than one."""
        return (self.height, self.width) if self.most == 1 else None

    def geometry(self, height: int, width: int, frames: int = 1, fps: float = 0.0) -> Geometry:
        """Return the geometry of an image's tiles and overview, or of a video's frames."""
        require_pixels(height, width)
        if frames > 1:
            views = [self.view(0, 0, self.height, self.width, time) for time in range(frames)]
            return self.arranged(height, width, views, frames, fps)
        return self.arranged(height, width, self.tiled(*self._tiles(height, width), self.height, self.width))

    def canvas(self, image: Image.Image, frames: int = 1) -> Image.Image:
        """Return the image stretched to its grid of tiles, or a video frame stretched to one tile."""
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
            large = height * width > 0.5 * self.height * self.width * columns * rows
            if distance < nearest or (distance == nearest and large):
                best, nearest = (rows, columns), distance
        return best

    def _grids(self) -> list[tuple[int, int]]:
        # Ties are broken in this order: fewest tiles first, then fewest columns.
        counts = range(1, self.most + 1)
        grids = [(rows, columns) for columns in counts for rows in counts if self.fewest <= rows * columns <= self.most]
        return sorted(grids, key=lambda grid: grid[0] * grid[1])


@dataclass(frozen=True, kw_only=True)
class AnyResSpec(PatchSpec):
    """LLaVA-NeXT and -OneVision: `side` of the overview and of a tile in pixels; `pinpoints`: resolutions (height, width).

    `most`: the limit of the packed grid, in tiles; None if there is none, as in LLaVA-NeXT.
    """

    side: int
    pinpoints: tuple[tuple[int, int], ...]
    most: int | None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> AnyResSpec:
        """Return the spec of the settings in a preprocessor_config.json; raise BundleError for unsupported ones.

        Those of LLaVA-OneVision also have the `vision_aspect_ratio` of the model's configuration.
        """
        kind = plain_name(settings, _ONEVISION)
        side = _side(settings, "size", kind)
        if kind == _ONEVISION:
            require_off(settings, "do_center_crop")
        if (kind == _NEXT or settings.get("crop_size") is not None) and _side(settings, "crop_size", kind) != side:
            raise refusal("crop_size", settings.get("crop_size"), f"{side} pixels as the size is")
        shared = patch_settings(settings, CLIP)
        if shared["merge"] != 1:
            raise refusal("merge_size", shared["merge"], "1")
        require_whole(side, shared["patch"], 1)
        most = _max_tiles(settings) if kind == _ONEVISION else None
        return cls(**shared, side=side, pinpoints=_pinpoints(settings, side, kind), most=most)

    def default_size(self) -> tuple[int, int] | None:
        """Return None: there is no default."""
        return None

    def geometry(self, height: int, width: int, frames: int = 1, fps: float = 0.0) -> Geometry:
        """Return the geometry of an image's overview and packed tiles, or of a video's frames."""
        require_pixels(height, width)
        rows, columns = self.grid(self.side, self.side)
        if frames == 1:
            packed = self._packed(height, width)
            return self.arranged(height, width, [replace(packed, rows=rows, columns=columns, separators=0), packed])
        halves = math.ceil(rows / 2), math.ceil(columns / 2)
        views = [View(0, 0, self.side, self.side, *halves, time=time) for time in range(frames)]
        newline = View(0, 0, 0, 0, 1, 0, separators=1, time=frames - 1)
        return self.arranged(height, width, [*views, newline], frames, fps)

    def canvas(self, image: Image.Image, frames: int = 1) -> Image.Image:
        """Return the image with bars at its best resolution, or a video frame stretched to an overview."""
        require_pixels(image.height, image.width)
        if frames > 1:
            return self.resized(image, self.side, self.side)
        height, width = self._best(image.height, image.width)
        down, across = height / image.height, width / image.width
        if across < down:
            inner = min(math.ceil(image.height * across), height), width
        else:
            inner = height, min(math.ceil(image.width * down), width)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(self.resized(image, *inner), ((width - inner[1]) // 2, (height - inner[0]) // 2))
        return canvas

    def patches(self, frames: Sequence[Image.Image]) -> np.ndarray:
        """Return float32 patches [patches of the overview and of each tile, or of each frame, 3 * patch * patch]."""
        overviews = [np.asarray(self.resized(frame, self.side, self.side)) for frame in frames]
        tiles = pieces(np.asarray(self.canvas(frames[0])), self.side, self.side) if len(frames) == 1 else []
        return self.cut([*overviews, *tiles])

    def _best(self, height: int, width: int) -> tuple[int, int]:
        best, most, least = self.pinpoints[0], 0, math.inf
        for resolution in self.pinpoints:
            scale = min(resolution[1] / width, resolution[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            wasted = resolution[0] * resolution[1] - kept
            if kept > most or (kept == most and wasted < least):
                best, most, least = resolution, kept, wasted
        return best

    def _packed(self, height: int, width: int) -> View:
        # The grid of all tiles without bars. Its box covers full tokens, so that it depends on the grid alone.
        across = self.side // self.patch
        total = [resolved // self.side * across for resolved in self._best(height, width)]
        rows, columns = total
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        top, left = ((full - kept) // 2 * self.side / across for full, kept in zip(total, (rows, columns), strict=True))
        box = round(top), round(left), round(rows * self.side / across), round(columns * self.side / across)
        ratio = 0.0 if self.most is None else math.sqrt(rows * columns / (self.most * across**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        if min(rows, columns) < 1:
            raise ImageError(
                f"A {height}x{width} image is too oblong: nothing would be left of its tiles.", hint="Crop it or pad it."
            )
        return View(*box, rows, columns, separators=1)


def _side(settings: Mapping[str, Any], key: str, kind: str) -> int:
    square = key == "crop_size" or switch(settings, "default_to_square", False)
    default = {"height": 384, "width": 384} if kind == _ONEVISION else {"height": 224, "width": 224}
    size = sides(settings, key, default, square=square)
    if set(size) not in ({"height", "width"}, {"shortest_edge"}) or len(set(size.values())) != 1:
        raise refusal(key, size, "equal height and width")
    return next(iter(size.values()))


def _pinpoints(settings: Mapping[str, Any], side: int, kind: str) -> tuple[tuple[int, int], ...]:
    value = settings.get("image_grid_pinpoints")
    value = _PINPOINTS[kind] if value is None else value
    pairs = isinstance(value, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value)
    if not pairs or not value or any(not isinstance(edge, int) or edge < 1 or edge % side for pair in value for edge in pair):
        raise refusal("image_grid_pinpoints", value, f"pairs of multiples of {side} pixels")
    return tuple((height, width) for height, width in value)


def _max_tiles(settings: Mapping[str, Any]) -> int:
    value = settings.get("vision_aspect_ratio")
    found = re.fullmatch(r"anyres_max_(\d+)", value) if isinstance(value, str) else None
    if found is None or int(found[1]) < 1:
        raise refusal("vision_aspect_ratio", value, "anyres_max_9, or another number of tiles")
    return int(found[1])
