"""The image geometry of a plan: how the vision encoder divides an image into views and visual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgeprune.io.typed_json import from_json

MAX_LAYERS, MAX_TOKENS = 4096, 2**31 - 1  # limits for values in files, far above any model


@dataclass(frozen=True)
class View:
    """A box of the preprocessed image that the vision encoder encodes at once, and its visual tokens.

    `top`, `left`, `height` and `width` are in pixels of the preprocessed image. The view has `rows` x `columns` tokens in reading
    order; each row is followed by `separators` tokens without a position in the image (newlines). `time` is the temporal position
    of its frame, counted from the first.
    """

    top: int
    left: int
    height: int
    width: int
    rows: int
    columns: int
    separators: int = 0
    time: int = 0

    @property
    def tokens(self) -> int:
        """Visual tokens of the view, separators included."""
        return self.rows * (self.columns + self.separators)

    def split(self) -> tuple[View, ...]:
        """Return the rows of the view, each as a view."""
        height = self.height // max(self.rows, 1)
        return tuple(replace(self, top=self.top + row * height, height=height, rows=1) for row in range(self.rows))


@dataclass(frozen=True)
class Geometry:
    """The image size that the graphs are exported for: `height` and `width` in pixels, and its division into visual tokens.

    `patch` is the processor's patch size in pixels, `merge` the patches merged along each side of a visual token. `views`: tiles
    or frames in sequence order; empty for one grid over the whole image. `frames` and `fps` (frames per second) describe a video;
    an image has one frame.
    """

    height: int
    width: int
    patch: int
    merge: int
    views: tuple[View, ...] = ()
    frames: int = 1
    fps: float = 0.0

    @property
    def rows(self) -> int:
        """Visual tokens along the height of the image as one grid."""
        return self.height // (self.patch * self.merge)

    @property
    def columns(self) -> int:
        """Visual tokens along the width of the image as one grid."""
        return self.width // (self.patch * self.merge)

    @property
    def layout(self) -> tuple[View, ...]:
        """The views; a single view of the whole image if `views` is empty."""
        return self.views or (View(0, 0, self.height, self.width, self.rows, self.columns),)

    @property
    def tokens(self) -> int:
        """Visual tokens of one image, or of one video."""
        return sum(view.tokens for view in self.layout)

    def spans(self, count: int) -> tuple[tuple[View, ...], ...] | None:
        """Return the views that stand at each of `count` places of an image in a prompt, with text between them.

        All views stand at one place, or each view at its own, or each row of every view. Returns None for any other count.
        """
        rows = [row for view in self.layout for row in view.split()]
        if count == 1:
            return (self.layout,)
        return next((tuple((view,) for view in views) for views in (self.layout, rows) if count == len(views)), None)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Geometry:
        """Build a geometry from JSON data; raise ValueError if it is malformed."""
        found = from_json(cls, data, "geometry")
        if min(found.height, found.width, found.patch, found.merge, found.frames) < 1 or found.fps < 0:
            raise ValueError("geometry has a size below 1")
        if any(min(asdict(view).values()) < 0 for view in found.views) or not 1 <= found.tokens <= MAX_TOKENS:
            raise ValueError("geometry has views without a place, or no visual tokens, or far too many")
        return found

    def __str__(self) -> str:
        size = f"{self.height}x{self.width} px"  # height first, as in --image-size
        clip = f"{self.frames} frames of {size}" if self.frames > 1 else size
        if not self.views:
            return f"{clip} = {self.rows} x {self.columns} visual tokens"
        views = "one view" if len(self.views) == 1 else f"{len(self.views)} views"
        return f"{clip} in {views} = {self.tokens} visual tokens"
