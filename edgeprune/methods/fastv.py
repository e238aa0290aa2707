"""FastV: drop the visual tokens that receive the least attention from the last token.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764. After layer K - 1 the visual tokens are
ranked by the attention they receive from the last prompt token, averaged over heads. Layers from K on get only the highest, at
their original positions.

Made static: the kept count is the plan's constant instead of round(N (1 - R)). The attention row is computed separately, so that
the main attention stays fused. Departure: none in the ranking.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.methods.base import LayerView, Scored
from edgeprune.plan import Cut, Geometry


class FastV(Scored):
    """Keep the tokens with the highest head-mean attention from the last prompt token."""

    sites: ClassVar[tuple[str, ...]] = ("layer",)

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        cut.settings()  # the ranking has no parameters

    def score(self, view: LayerView) -> torch.Tensor:
        """Return the head-mean attention [V]."""
        mean: torch.Tensor = view.attention().mean(dim=0)
        return mean
