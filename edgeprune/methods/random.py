"""Random: keep randomly drawn tokens, the baseline that many published methods do not beat.

UniPruneBench (arXiv 2511.02650) finds it stronger than most attention-based methods at high pruning. The ranking is drawn once from
the cut's seed and frozen into the graph: the same places are kept in every image. Later cuts with the same seed keep a subset of
the tokens that earlier ones kept.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from edgeprune.methods.base import EncoderView, InputView, LayerView, Scored
from edgeprune.plan import Cut, Geometry


class Random(Scored):
    """Keep the highest ranks of a seeded permutation of the image's tokens."""

    sites: ClassVar[tuple[str, ...]] = ("vision", "input", "layer", "cache")
    attention: ClassVar[str] = ""

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        cut.settings()
        ranks = np.random.default_rng(cut.seed).permutation(geometry.tokens)
        self._scores = torch.from_numpy(ranks.astype(np.float32))

    def score(self, view: EncoderView | InputView | LayerView) -> torch.Tensor:
        """Return the frozen rank of each token [V]."""
        return self._scores.to(view.order.device).index_select(0, view.order)
