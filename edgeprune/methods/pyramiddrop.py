"""PyramidDrop: drop visual tokens in stages, at each stage those with the least attention from the last instruction token.

Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", CVPR 2025, arXiv
2410.17247. Half of the tokens stay after each of layers 8, 16 and 24 of 32. The ranking is the head-mean attention of the last
instruction token, computed with the query and key projections of the next layer.

Made static: the counts are the plan's constants. Departure: tokens keep their original positions; the paper's code renumbers them
after each stage.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.methods.base import LayerView, Scored
from edgeprune.plan import Cut, Geometry


class PyramidDrop(Scored):
    """Keep the tokens with the highest head-mean attention in the next layer."""

    sites: ClassVar[tuple[str, ...]] = ("layer",)
    attention: ClassVar[str] = "next"

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        cut.settings()  # the ranking has no parameters

    def score(self, view: LayerView) -> torch.Tensor:
        """Return the head-mean attention [V]."""
        mean: torch.Tensor = view.next_attention().mean(dim=0)
        return mean
