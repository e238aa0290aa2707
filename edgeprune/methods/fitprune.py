"""FitPrune: drop tokens to which neither text nor other visual tokens attend, by a recipe fitted offline.

Ye et al., "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models", AAAI 2025, arXiv
2409.10197. A token's score is the product of the attention it receives from text (cross) and from visual tokens (self), each the
maximum over heads. The recipe sets the counts; `edgeprune.calibration.collect.measure` makes it.

Made static: the method already is. Departure: the recipe's many small deletions are grouped into a few stages between layers; the
paper deletes inside every attention.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.methods.base import LayerView, Scored
from edgeprune.plan import Cut, Geometry, Option


class FitPrune(Scored):
    """Keep the tokens with the highest product of cross and self attention."""

    sites: ClassVar[tuple[str, ...]] = ("layer",)
    calibration_options: ClassVar[tuple[Option, ...]] = (
        Option("stages", 4, "cuts into which the recipe's deletions are gathered", least=1),
    )

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        cut.settings()  # the ranking has no parameters

    def score(self, view: LayerView) -> torch.Tensor:
        """Return the product of cross and self attention [V]."""
        cross, within = attention_received(view)
        return cross * within


def attention_received(view: LayerView) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each visual token's attention from text (mean) and from visual tokens (sum) [V], both of the maxima over heads."""
    return view.text_attention().amax(dim=0).mean(dim=0), view.visual_attention().amax(dim=0).sum(dim=0)
