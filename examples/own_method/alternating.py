"""A pruning method of our own: by turns the token that is looked at most, and the one that lies farthest from those taken.

Attention finds what a short question is about and loses the rest of the scene; an even spread does the opposite. This takes both
orders and keeps the tokens that come first in either.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.methods.base import LayerView, Scored
from edgeprune.methods.uniform import Uniform
from edgeprune.plan import Cut, Geometry


class Alternating(Scored):
    """Rank tokens by FastV's attention and by Uniform's spread, and take from both in turns."""

    sites: ClassVar[tuple[str, ...]] = ("layer",)

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        self._spread = Uniform(cut, geometry)  # refuses options, as there are none

    def score(self, view: LayerView) -> torch.Tensor:
        """Return minus the turn in which each token is taken [V]."""
        looked_at = place_of(view.attention().mean(dim=0))
        spread = place_of(self._spread.score(view))
        return -torch.minimum(2 * looked_at, 2 * spread + 1)


def place_of(scores: torch.Tensor) -> torch.Tensor:
    """Return how many tokens have a higher score than each [V]. By TopK twice: graphs for TensorRT have no Sort."""
    order = torch.topk(scores, scores.shape[0]).indices
    return torch.topk(order, order.shape[0], largest=False, sorted=True).indices
