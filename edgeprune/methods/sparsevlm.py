"""SparseVLM: rank visual tokens by the attention of those text tokens that resemble the image.

Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025, arXiv
2410.04417, in the first version of the authors' code (Gumpest/SparseVLMs, USE_VERSION 1_0). Raters are the text tokens whose
similarity to all visual tokens, after a softmax over the text, is above average. They are chosen once, from the embeddings. A
visual token's score is its mean attention from the raters in the layer whose output is pruned: a cut "before layer l" prunes the
output of layer l - 1, so the authors' layers 2, 6 and 15 are cuts before layers 3, 7 and 16.

Made static: the set of raters is a mask instead of a list, and the counts are the plan's constants (the authors' code has a fixed
table too). Departures: dropped tokens are not merged into recycled ones, and tokens keep their positions. Where all texts resemble
the image equally, as a single one does, all are raters; the authors' code then has none.
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
    average = similarity.mean()
    return ((similarity > average) | (similarity.amax(dim=0) <= average)).to(text.dtype)
