"""CDPruner: keep a set that is both diverse and relevant to the prompt, by a conditional determinantal point process (DPP).

Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS 2025, arXiv
2506.10967. The kernel is the cosine similarity of the visual tokens, scaled on both sides by each token's relevance. The set of
largest determinant is built greedily with the fast update of Chen et al. (arXiv 1709.05135).

Made static: no change needed. Departure, as in OpenVINO GenAI: relevance is the mean cosine to the prompt in the language model's
own embedding space, rescaled to [0, 1]; the paper uses CLIP's text tower (and negates). Option weight w: relevance counts as
exp(w / (2 (1 - w)) * relevance), so w = 0 ignores it. Kept tokens keep their original positions.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.methods.base import InputView, ascending, cosine
from edgeprune.plan import Cut, Geometry, Option

_TINY = 1e-6


class CDPruner:
    """Keep the greedy MAP set of a relevance-conditioned DPP."""

    sites: ClassVar[tuple[str, ...]] = ("input",)
    needs: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "weight", 0.5, "of relevance against diversity; 0 ignores relevance", least=0.0, most=0.98, tries=(0.0, 0.2, 0.5, 0.8)
        ),
    )

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        weight = float(cut.settings(*self.options)["weight"])
        self._theta = weight / (2 * (1 - weight))

    def select(self, view: InputView, keep: int) -> torch.Tensor:
        """Return the ascending positions [min(keep, V)] of the set."""
        relevance = cosine(view.visual, view.prompt).mean(dim=1)
        lowest, highest = relevance.amin(dim=0), relevance.amax(dim=0)
        scale = torch.exp(self._theta * (relevance - lowest) / (highest - lowest + _TINY))
        kernel = scale[:, None] * cosine(view.visual, view.visual) * scale[None]
        return ascending(greedy_map(kernel, min(keep, view.visual.shape[0])))


def greedy_map(kernel: torch.Tensor, count: int) -> torch.Tensor:
    """Return the positions [count], in order of selection, of a greedy search for the largest determinant in a kernel [V, V].

    Each step takes the token that adds the most volume and projects it out of the remaining volume of the others.
    """
    positions = torch.arange(kernel.shape[0], device=kernel.device)
    gain = kernel.diagonal()
    factors = torch.zeros_like(kernel[:1])  # rows of the incremental Cholesky factor; a first row of zeros avoids an empty sum
    picked = []
    for _ in range(count):
        best = torch.topk(gain, 1).indices
        picked.append(best)
        row = kernel.index_select(0, best) - (factors.index_select(1, best) * factors).sum(dim=0, keepdim=True)
        factor = row / gain.index_select(0, best).clamp_min(_TINY).sqrt()
        factors = torch.cat([factors, factor])
        gain = torch.where(positions == best, float("-inf"), gain - factor[0].square())
    return torch.cat(picked)
