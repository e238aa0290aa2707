"""SparseVLM: rank visual tokens by the attention of those text tokens that resemble the image.

Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025, arXiv
2410.04417. Raters are the text tokens whose similarity to the visual tokens, after a softmax over the text, is above average. A
visual token's score is its mean attention from the raters.

Made static: the set of raters is a mask instead of a list, and the counts are the plan's constants (the authors' code also has a
fixed table). Departures, as in the authors' second version: dropped tokens are not merged, and tokens keep their positions.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.methods.base import LayerView, Scored
from edgeprune.plan import Cut, Geometry


class SparseVLM(Scored):
    """Keep the tokens with the highest attention from the text raters."""

    sites: ClassVar[tuple[str, ...]] = ("layer",)

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        cut.settings()  # the ranking has no parameters

    def score(self, view: LayerView) -> torch.Tensor:
        """Return the raters' attention [V], averaged over heads and summed over raters, which ranks like their mean."""
        attention = view.text_attention().mean(dim=0)  # [T, V]
        score: torch.Tensor = text_raters(*view.embeds()) @ attention
        return score


def text_raters(visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Return the mask of raters [T], 1 or 0, among `text` [T, hidden] for `visual` [V, hidden] embeddings."""
    similarity = torch.softmax(visual @ text.transpose(0, 1), dim=1).sum(dim=0)
    return (similarity > similarity.mean()).to(text.dtype)
