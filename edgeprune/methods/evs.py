"""EVS: keep the first frame of a video and the tokens that changed most since the previous frame.

Bagrov et al., "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", arXiv 2510.14624, in the
form of the authors' code for vLLM (vllm/multimodal/evs.py), which compares tokens where the paper compares pixels: a token's score
is its cosine distance to the token at the same place in the previous frame. The first frame is kept completely. The rest of the
budget goes to the highest scores of the entire video, regardless of the frame.

Made static: no change needed. A frame is one grid of the vision encoder: with Qwen's encoders, two pictures. Kept tokens keep their
original positions. Departure: a budget below one frame is refused, where that code raises it.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.errors import PlanError
from edgeprune.methods.base import InputView, Scored, unit
from edgeprune.plan import Cut, Geometry

_FIRST = 4.0  # above the largest cosine distance, 2


class EVS(Scored):
    """Keep the first frame and the tokens that change most after it."""

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
        """Return the cosine distance [V] of each token to the same place in the previous frame; the first frame scores highest."""
        frames = unit(view.visual).view(self._frames, -1, view.visual.shape[1])
        changed = 1 - (frames[1:] * frames[:-1]).sum(dim=-1)
        return torch.cat([torch.full_like(changed[:1], _FIRST), changed]).flatten()
