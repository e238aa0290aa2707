"""CDPruner: keep a set that is both diverse and relevant to the prompt, by a conditional determinantal point process (DPP).

Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS 2025, arXiv
2506.10967. The kernel is the cosine similarity of the visual tokens, scaled on both sides by each token's relevance. The set of
largest determinant is built greedily with the fast update of Chen et al. (arXiv 1709.05135).

Made static: no change needed. Option weight w: relevance r in [0, 1] counts as exp(w / (2 (1 - w)) r), so w = 0 ignores it; w = 1,
the default, counts r itself. The authors' code (Theia-4869/CDPruner) ships with r itself and has the exponential in comments, with
w = 0.5; OpenVINO GenAI has both. Departures, as in OpenVINO GenAI: relevance is the mean cosine to the prompt in the language
model's own embedding space; the authors use CLIP's text tower (and negate). Kept tokens keep their original positions. Once the
set spans all remaining tokens, the most relevant of these follow; the authors' code then repeats tokens.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.methods.base import InputView, ascending, cosine
from edgeprune.plan import Cut, Geometry, Option

_TINY = 1e-6  # the authors' offset of relevance, and the volume below which float32 leaves only rounding


class CDPruner:
    """Keep the greedy MAP set of a relevance-conditioned DPP."""

    sites: ClassVar[tuple[str, ...]] = ("input",)
    needs: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "weight",
            1.0,
            "of relevance against diversity; 0 ignores relevance, 1 multiplies by it",
            least=0.0,
            most=1.0,
            tries=(0.0, 0.2, 0.5, 0.8, 1.0),
            published=True,
        ),
        Option("weigh", False, "the decoder attends to each kept token by how many it stands for; no later cut may follow"),
    )

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        self._weight = float(cut.settings(*self.options)["weight"])

    def select(self, view: InputView, keep: int) -> torch.Tensor:
        """Return the ascending positions [min(keep, V)] of the set."""
        relevance = cosine(view.visual, view.prompt).mean(dim=1)
        lowest, highest = relevance.amin(dim=0), relevance.amax(dim=0)
        relevance = (relevance - lowest + _TINY) / (highest - lowest).clamp_min(_TINY)
        similarity = cosine(view.visual, view.visual)
        return ascending(greedy_map(similarity, self._scale(relevance), relevance, min(keep, view.visual.shape[0])))

    def _scale(self, relevance: torch.Tensor) -> torch.Tensor:
        if self._weight == 1.0:
            return relevance
        # A common factor changes no choice. Without the largest relevance the exponential cannot overflow.
        return torch.exp(self._weight / (2 * (1 - self._weight)) * (relevance - relevance.amax(dim=0)))


def greedy_map(kernel: torch.Tensor, scale: torch.Tensor, relevance: torch.Tensor, count: int) -> torch.Tensor:
    """Return the positions [count], all different, of a greedy search for the largest determinant of a scaled kernel.

    The kernel [V, V] has its rows and columns multiplied by `scale` [V]. Each step takes the token that adds the most volume and
    projects it out of the remaining volume of the others. Where no token adds any, the highest `relevance` [V] follows.
    """
    # The scale factors out of the incremental Cholesky factor, so volumes are compared to rounding without it.
    positions = torch.arange(kernel.shape[0], device=kernel.device)
    volume, worth = kernel.diagonal(), scale.square()
    factors = torch.zeros_like(kernel[:1])  # rows of the incremental Cholesky factor; a first row of zeros avoids an empty sum
    filling = relevance - relevance.amax(dim=0) - 1  # below every volume
    picked = []
    for _ in range(count):
        gain = worth * torch.where(volume > _TINY, volume, 0.0)
        best = torch.topk(torch.where(gain > 0, gain, filling), 1).indices
        picked.append(best)
        row = kernel.index_select(0, best) - (factors.index_select(1, best) * factors).sum(dim=0, keepdim=True)
        left = volume.index_select(0, best)
        factor = torch.where(left > _TINY, row / left.clamp_min(_TINY).sqrt(), 0.0)
        factors = torch.cat([factors, factor])
        volume = torch.where(positions == best, 0.0, volume - factor[0].square())
        filling = torch.where(positions == best, float("-inf"), filling)
    return torch.cat(picked)
