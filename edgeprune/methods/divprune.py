"""DivPrune: keep the tokens that differ most from each other, independent of the prompt.

Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025, arXiv 2503.02175. The
first token is the farthest from its nearest neighbour (cosine distance); each further one is the farthest from all chosen ones
(max-min).

Made static: no change needed. Departure: kept tokens keep their original positions. Option block: see `base.add_most_different`.
Our addition: option weigh, see `base.represented`.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.methods.base import InputView, add_most_different, ascending, cosine
from edgeprune.plan import Cut, Geometry, Option


class DivPrune:
    """Keep a max-min diverse set."""

    sites: ClassVar[tuple[str, ...]] = ("input",)
    needs: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "block", 1, "tokens that each step of the greedy search takes, which may resemble each other", least=1, published=True
        ),
        Option("weigh", False, "the decoder attends to each kept token by how many it stands for; no later cut may follow"),
    )

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        self._block = cut.settings(*self.options)["block"]

    def select(self, view: InputView, keep: int) -> torch.Tensor:
        """Return the ascending positions [min(keep, V)] of the set."""
        count = view.visual.shape[0]
        similarity = cosine(view.visual, view.visual)
        order = torch.arange(count, device=similarity.device)
        others = torch.where(order[:, None] == order[None], -2.0, similarity)  # a token is not its own neighbour
        first = torch.topk(others.amax(dim=0), 1, largest=False).indices
        return ascending(add_most_different(similarity, first, min(keep, count) - 1, block=self._block))
