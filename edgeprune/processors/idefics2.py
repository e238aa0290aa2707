"""Idefics2's image processor: the image in its own aspect within limits, and with splitting its four quarters before it.

Bit for bit what transformers does in models/idefics2/image_processing_pil_idefics2.py: quarters are cut out first, then each view
is resized on its own, down to the longest edge and then up to the shortest. A perceiver makes the same number of visual tokens of
every view, which stand for no place. The encoder sees every view in the size of the last one's box, in whole patches.

Departure: where the views come out in different sizes, upstream fills them up with zeros and masks those in attention. The graphs
have no mask, so such images are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.errors import ImageError
from edgeprune.plan import Geometry, View
from edgeprune.processors.base import HALF, PatchSpec, patch_settings, refuse_video, require_pixels, require_rgb, require_whole
from edgeprune.processors.settings import positive, refusal, require_on, sides, switch


@dataclass(frozen=True, kw_only=True)
class Idefics2Spec(PatchSpec):
    """`shortest` and `longest` edge in pixels, or a `fixed` size (height, width); `latents`: visual tokens of a view."""

    shortest: int
    longest: int
    fixed: tuple[int, int] | None
    splits: bool
    latents: int
    spatial: bool = False

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Idefics2Spec:
        """Return the spec in a preprocessor_config.json; raise BundleError for what this runtime cannot honour.

        The settings also have `latents`, those of the model's perceiver.
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
        """Return the size of every view where it is fixed."""
        return self.fixed

    def geometry(self, height: int, width: int, frames: int = 1, fps: float = 0.0) -> Geometry:
        """Return the quarters of an image, if it is split, and the whole of it."""
        refuse_video(frames)
        rows, columns = self._whole(height, width)
        whole = View(0, 0, rows, columns, 1, self.latents)
        if not self.splits:
            return self.arranged(height, width, [whole])
        tops, lefts = (0, rows // 2, rows), (0, columns // 2, columns)
        quarters = [
            View(tops[row], lefts[column], tops[row + 1] - tops[row], lefts[column + 1] - lefts[column], 1, self.latents)
            for row in (0, 1)
            for column in (0, 1)
        ]
        return self.arranged(height, width, [*quarters, whole])

    def canvas(self, image: Image.Image, frames: int = 1) -> Image.Image:
        """Return the whole image as the encoder sees it."""
        return self.resized(image, *self._whole(image.height, image.width))

    def patches(self, frames: Sequence[Image.Image]) -> np.ndarray:
        """Return float32 patches [patches of all views, 3 * patch * patch]."""
        refuse_video(len(frames))
        image = require_rgb(frames[0])
        size = self._whole(image.height, image.width)
        middle, bottom = image.width // 2, image.height // 2
        boxes = [(0, 0, middle, bottom), (middle, 0, image.width, bottom)]
        boxes += [(left, bottom, right, image.height) for left, _, right, _ in boxes]
        views = [*(image.crop(box) for box in boxes), image] if self.splits else [image]
        return self.cut([np.asarray(self.resized(view, *size)) for view in views])

    def _whole(self, height: int, width: int) -> tuple[int, int]:
        # The size of every view; refused where they differ.
        require_pixels(height, width)
        size = self._scaled(height, width)
        if self.splits and not self._alike(height, width):
            near = self._near(height, width)
            raise ImageError(
                f"The quarters of a {width}x{height} image become other sizes than the whole, which is not supported.",
                hint=f"A near size that works is {near[1]}x{near[0]}: take that for the bundle, and stretch images to it.",
            )
        return size

    def _alike(self, height: int, width: int) -> bool:
        if min(height, width) < 2:
            return False
        rows, columns = {height // 2, -(-height // 2)}, {width // 2, -(-width // 2)}
        return {self._scaled(row, column) for row in rows for column in columns} == {self._scaled(height, width)}

    def _near(self, height: int, width: int) -> tuple[int, int]:
        # Of even size and twice as long as the longest edge, quarters and the whole are scaled down to it alike.
        scale = max(1.0, 2 * self.longest / max(height, width))
        shape = 2 * round(height * scale / 2), 2 * round(width * scale / 2)
        while not self._alike(*shape):
            shape = shape[0] + 2, shape[1] + 2
        return shape

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        if self.fixed is not None:
            return self.fixed
        aspect = width / height
        if width >= height and width > self.longest:
            height, width = int(self.longest / aspect), self.longest
        elif height > width and height > self.longest:
            height, width = self.longest, int(self.longest * aspect)
        return max(height, self.shortest), max(width, self.shortest)
