"""EViT: keep the tokens that the class token attends to, inside the vision encoder.

Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR 2022, arXiv
2202.07800, section 3.2: tokens are ranked by the attention that they receive from the class token, averaged over heads, and the
encoder continues with the highest.

Made static: the kept count is the plan's constant instead of a keep rate per layer. Departures: tokens are dropped between two
blocks, in the paper between attention and MLP of one block; dropped tokens are not fused into one; nothing is trained. The patches
of a visual token are dropped together, ranked by their mean. Reconstruction: for encoders without a class token, attention is
averaged over all queries.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.methods.base import EncoderView, Scored
from edgeprune.plan import Cut, Geometry


class EViT(Scored):
    """Keep the tokens that receive the most attention in the block before the cut."""

    sites: ClassVar[tuple[str, ...]] = ("vision",)

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        cut.settings()  # the ranking has no parameters

    def score(self, view: EncoderView) -> torch.Tensor:
        """Return the attention that each token received [V]."""
        received: torch.Tensor = view.attention()
        return received
