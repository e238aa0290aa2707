"""SparseVLM: let the words that resemble the picture rate the visual tokens.

Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025, arXiv
2410.04417. Raters are the text tokens whose similarity to the visual tokens, softmaxed over the text, is above average; a visual
token's score is the mean attention that the raters pay to it.

Made static: the set of raters is a mask instead of a list, and the counts are the plan's constants (the authors' code has a
fixed table too). Departures, as in the authors' second version: dropped tokens are not merged, and positions are kept.
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
        """Return the raters' attention [V], averaged over heads and added up over raters, which ranks as their mean does."""
        attention = view.text_attention().mean(dim=0)  # [T, V]
        score: torch.Tensor = text_raters(*view.embeds()) @ attention
        return score


def text_raters(visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Return 1 for every text token that rates, else 0 [T], of embeddings [V, hidden] and [T, hidden]."""
    similarity = torch.softmax(visual @ text.transpose(0, 1), dim=1).sum(dim=0)
    return (similarity > similarity.mean()).to(text.dtype)
