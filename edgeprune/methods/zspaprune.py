"""ZSPAPrune: keep a core of tokens that are relevant to the prompt, then those that differ most from the kept ones.

Zhang et al., "ZSPAPrune: Zero-Shot Prompt-Aware Token Pruning for Vision-Language Models", arXiv 2510.17197. The prompt's
embeddings are averaged into one vector. The visual tokens most similar to it (cosine) form the core. The rest of the budget goes,
one by one, to the token least similar to all chosen ones (greedy max-min).

Made static: no change needed, the budget is a constant fraction in the paper too. Reconstruction: the paper's split between core
and supplement, its similarity to a set and whether template tokens count were not available to us. Here similarity is to the
nearest chosen token (reduce = "max", or "mean"), and the prompt is the user's text only. Our addition: how much a token differs
weighs by its norm (option norm; 0 for cosine alone). The defaults of core and norm are what calibration favours on the bundled
model: there a core of one token, and norms of exponent 1/2. Other models want larger cores: `edgeprune calibrate --method
zspaprune` compares. Option relevance: "pooled" as published; "mean" and "max" reduce the similarities to the single prompt
tokens. Option block: see `base.add_most_different`. Our addition too: option weigh, see `base.represented`.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.methods.base import InputView, add_most_different, ascending, cosine
from edgeprune.plan import Cut, Geometry, Option

_TINY, _MARGIN, _LEAST = 1e-30, 1.001, 1e-3


class ZSPAPrune:
    """Keep a relevant core and a diverse supplement."""

    sites: ClassVar[tuple[str, ...]] = ("input",)
    needs: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "core",
            0.0,
            "share of the budget that the relevant core takes, at least one token",
            least=0.0,
            most=1.0,
            tries=(0.0, 0.05, 0.15, 0.3, 0.5),
        ),
        Option(
            "relevance",
            "pooled",
            "similarity to the mean of the words, or the mean or maximum over words",
            ("pooled", "mean", "max"),
            tries=("pooled", "max"),
        ),
        Option(
            "norm",
            0.5,
            "exponent by which its norm weighs how much a token differs; 0 ignores norms",
            least=0.0,
            most=4.0,
            tries=(0.0, 0.5),
        ),
        Option("reduce", "max", "similarity to a set: that to its nearest token, or the mean", ("max", "mean")),
        Option("block", 1, "tokens that each step of the greedy search takes, which may resemble each other", least=1),
        Option("weigh", False, "the decoder attends to each kept token by how many it stands for; no later cut may follow"),
    )

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        settings = cut.settings(*self.options)
        self._core, self._relevance = float(settings["core"]), settings["relevance"]
        self._reduce, self._block, self._norm = settings["reduce"], settings["block"], float(settings["norm"])

    def select(self, view: InputView, keep: int) -> torch.Tensor:
        """Return the ascending positions [min(keep, V)] of core and supplement."""
        keep = min(keep, view.visual.shape[0])
        core = min(keep, max(1, round(self._core * keep)))  # the supplement needs at least one token to differ from
        chosen = torch.topk(self.relevance(view), core).indices
        if core < keep:
            similarity = self._similarity(view.visual)
            chosen = add_most_different(similarity, chosen, keep - core, block=self._block, reduce=self._reduce)
        return ascending(chosen)

    def _similarity(self, visual: torch.Tensor) -> torch.Tensor:
        # [chosen, candidate]: what is below 1 weighs by the candidate's norm. The margin keeps the sign for equal tokens.
        similarity = cosine(visual, visual)
        if not self._norm:
            return similarity
        rows = visual.float()
        rows = rows / rows.abs().amax(dim=1).amax(dim=0).clamp_min(_TINY)
        norms = rows.norm(dim=1)
        share = norms / norms.amax(dim=0).clamp_min(_TINY)
        # NaN, the share of a token that is not finite, compares false.
        weight = torch.where(share >= _LEAST, share, _LEAST).pow(self._norm)
        return (similarity - _MARGIN) * weight[None]

    def relevance(self, view: InputView) -> torch.Tensor:
        """Return how similar each visual token is to the prompt [V]."""
        if self._relevance == "pooled":
            return cosine(view.visual, view.prompt.mean(dim=0, keepdim=True))[:, 0]
        each = cosine(view.visual, view.prompt)
        return each.mean(dim=1) if self._relevance == "mean" else each.amax(dim=1)
