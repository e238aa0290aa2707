"""FitPrune: drop tokens that neither the text nor the other visual tokens attend to, as many as a recipe fitted offline says.

Ye et al., "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models", AAAI 2025, arXiv
2409.10197. A token's score is the product of the attention it gets from text (cross) and from visual tokens (self), each the
maximum over heads. The recipe is made by `edgeprune.calibration.collect.measure`.

Made static: it is by nature. Departure: the recipe's many small deletions are gathered into a few stages between layers, where the
paper deletes inside every attention.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.methods.base import LayerView, Scored
from edgeprune.plan import Cut, Geometry


class FitPrune(Scored):
    """Keep the tokens with the highest product of cross and self attention."""

    sites: ClassVar[tuple[str, ...]] = ("layer",)

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        cut.settings()  # the ranking has no parameters

    def score(self, view: LayerView) -> torch.Tensor:
        """Return cross times self [V]."""
        cross, within = attention_received(view)
        return cross * within


def attention_received(view: LayerView) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention that each visual token gets from text, on average, and from all visual tokens: head maxima [V] each."""
    return view.text_attention().amax(dim=0).mean(dim=0), view.visual_attention().amax(dim=0).sum(dim=0)
