"""EViT: inside the vision encoder, keep the tokens that its class token attends to.

Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR 2022, arXiv
2202.07800, section 3.2: tokens are ranked by the attention that they receive from the class token, averaged over heads, and the
encoder goes on with the best.

Made static: the kept count is the plan's constant instead of a keep rate of each layer. Departures: tokens leave between two
blocks, where the paper lets them leave between attention and MLP of one; those that leave are not fused into a token of their own;
nothing is trained. Whole visual tokens leave, ranked by the mean over the patches that are merged into them. Encoders without a
class token are asked by the mean over their queries, which is a reconstruction.
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
        """Return the attention received [V]."""
        received: torch.Tensor = view.attention()
        return received
