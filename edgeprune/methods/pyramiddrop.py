"""PyramidDrop: drop visual tokens in stages, each time those that the last instruction token looks at least.

Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", CVPR 2025, arXiv
2410.17247. After layers 8, 16 and 24 of 32 half of the tokens stay; the ranking is the head-mean attention of the last
instruction token, computed with the query and key projections of the layer that comes next.

Made static: the counts are the plan's constants. Departure: tokens keep their original positions, where the paper's code
renumbers them after each stage.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.methods.base import LayerView, Scored
from edgeprune.plan import Cut, Geometry


class PyramidDrop(Scored):
    """Keep the tokens with the highest head-mean attention as the next layer will see it."""

    sites: ClassVar[tuple[str, ...]] = ("layer",)

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        cut.settings()  # the ranking has no parameters

    def score(self, view: LayerView) -> torch.Tensor:
        """Return the head-mean attention [V]."""
        mean: torch.Tensor = view.next_attention().mean(dim=0)
        return mean
