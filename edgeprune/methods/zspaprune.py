"""ZSPAPrune: keep a core of tokens that are relevant to the prompt, then those that differ most from the kept ones.

Zhang et al., "ZSPAPrune: Zero-Shot Prompt-Aware Token Pruning for Vision-Language Models", arXiv 2510.17197. The prompt's
embeddings are averaged into one vector. The visual tokens most similar to it (cosine) form the core. The rest of the budget goes,
one by one, to the token least similar to all chosen ones (greedy max-min).

Made static: no change needed, the budget is a constant fraction in the paper too. Reconstruction: the paper's split between core
and supplement, its similarity to a set and whether template tokens count were not available to us. Here the core takes half
(option core), similarity is to the nearest chosen token (reduce = "max", or "mean"), and the prompt is the user's text only.
Option relevance: "pooled" as published; "mean" and "max" reduce the similarities to the single prompt tokens. Option block: see
`base.add_most_different`.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.methods.base import InputView, add_most_different, ascending, cosine
from edgeprune.plan import Cut, Geometry, Option


class ZSPAPrune:
    """Keep a relevant core and a diverse supplement."""

    sites: ClassVar[tuple[str, ...]] = ("input",)
    needs: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[Option, ...]] = (
        Option("core", 0.5, "share of the budget that the relevant core takes", least=0.0, most=1.0),
        Option(
            "relevance",
            "pooled",
            "similarity to the mean of the words, or the mean or maximum over words",
            ("pooled", "mean", "max"),
        ),
        Option("reduce", "max", "similarity to a set: that to its nearest token, or the mean", ("max", "mean")),
        Option("block", 1, "tokens that each step of the greedy search takes, which may resemble each other", least=1),
    )

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        settings = cut.settings(*self.options)
        self._core, self._relevance = float(settings["core"]), settings["relevance"]
        self._reduce, self._block = settings["reduce"], settings["block"]

    def select(self, view: InputView, keep: int) -> torch.Tensor:
        """Return the ascending positions [min(keep, V)] of core and supplement."""
        keep = min(keep, view.visual.shape[0])
        core = min(keep, max(1, round(self._core * keep)))  # the supplement needs at least one token to differ from
        chosen = torch.topk(self.relevance(view), core).indices
        if core < keep:
            similarity = cosine(view.visual, view.visual)
            chosen = add_most_different(similarity, chosen, keep - core, block=self._block, reduce=self._reduce)
        return ascending(chosen)

    def relevance(self, view: InputView) -> torch.Tensor:
        """Return how similar each visual token is to the prompt [V]."""
        if self._relevance == "pooled":
            return cosine(view.visual, view.prompt.mean(dim=0, keepdim=True))[:, 0]
        each = cosine(view.visual, view.prompt)
        return each.mean(dim=1) if self._relevance == "mean" else each.amax(dim=1)
