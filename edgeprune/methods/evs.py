"""EVS: of a video's frames after the first, keep what changed most since the frame before.

Bagrov et al., "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", arXiv 2510.14624, in the
form of the authors' code for vLLM (vllm/multimodal/evs.py), which compares the tokens where the paper compares pixels: one counts
by its cosine distance to the token at the same place of the frame before. The first frame stays whole, and the budget goes to the
highest of the whole video, however they fall on its frames.

Made static: nothing had to change. A frame is what the vision encoder makes one grid of: with Qwen's encoders, two pictures. Kept
tokens stay at their original positions. Departure: a budget below one frame is refused, where that code raises it.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.errors import PlanError
from edgeprune.methods.base import InputView, Scored
from edgeprune.plan import Cut, Geometry

_FIRST = 4.0  # above every cosine distance, which end at 2


class EVS(Scored):
    """Keep the first frame and what changes after it."""

    sites: ClassVar[tuple[str, ...]] = ("input",)
    videos_only: ClassVar[bool] = True
    whole_frames: ClassVar[bool] = True

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        cut.settings()
        frames = geometry.layout
        if geometry.frames == 1 or len(frames) == 1:
            raise PlanError(f"{cut} needs a video of two frames or more.", hint="For images, divprune also keeps what differs.")
        if len({(frame.rows, frame.columns, frame.separators) for frame in frames}) > 1:
            raise PlanError(f"{cut} needs frames of equal grids.")
        if cut.keep < frames[0].tokens:
            raise PlanError(f"{cut} keeps the first frame whole: {frames[0].tokens} tokens or more, not {cut.keep}.")
        self._frames = len(frames)

    def score(self, view: InputView) -> torch.Tensor:
        """Return the cosine distance [V] of each token to the one before it in time."""
        frames = torch.nn.functional.normalize(view.visual.float(), dim=-1).view(self._frames, -1, view.visual.shape[1])
        changed = 1 - (frames[1:] * frames[:-1]).sum(dim=-1)
        return torch.cat([torch.full_like(changed[:1], _FIRST), changed]).flatten()
