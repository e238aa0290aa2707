"""DART: keep a few pivots and, for each pivot, the tokens least similar to it.

Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", EMNLP 2025, arXiv
2502.11494, in the embedding-level form that NVIDIA's TensorRT Edge-LLM documents: pivots are the visual and prompt tokens of the
largest L1 norm in the decoder's input, and the budget is divided among them.

Made static: quotas are constants that add up to the budget exactly. Reconstruction: the order of the pivots (visual ones first, by
norm). A prompt shorter than text_pivots contributes some tokens twice. Kept tokens keep their original positions.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.methods.base import InputView, ascending, cosine
from edgeprune.plan import Cut, Geometry, Option


class DART:
    """Keep pivots and the tokens least similar to them."""

    sites: ClassVar[tuple[str, ...]] = ("input",)
    needs: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[Option, ...]] = (
        Option("image_pivots", 4, "visual tokens of the largest norm that are pivots", least=1, published=True),
        Option("text_pivots", 4, "prompt tokens of the largest norm that are pivots", least=0, published=True),
        Option("weigh", False, "the decoder attends to each kept token by how many it stands for; no later cut may follow"),
    )

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        settings = cut.settings(*self.options)
        self._image_pivots, self._text_pivots = settings["image_pivots"], settings["text_pivots"]

    def select(self, view: InputView, keep: int) -> torch.Tensor:
        """Return the ascending positions [min(keep, V)] of the visual pivots and the least similar tokens."""
        visual = view.visual
        keep = min(keep, visual.shape[0])
        own = torch.topk(visual.float().abs().sum(dim=1), min(self._image_pivots, keep)).indices
        pivots = torch.cat([visual.index_select(0, own), self._prompt_pivots(view.prompt)])
        similarity = cosine(pivots, visual)
        positions = torch.arange(visual.shape[0], device=visual.device)
        taken = (positions[:, None] == own[None]).any(dim=1)
        picked = [own]
        left = keep - own.shape[0]
        for index in range(pivots.shape[0]):
            quota = -(-left // (pivots.shape[0] - index))  # the remaining budget, divided among the remaining pivots
            if quota == 0:
                break
            best = torch.topk(similarity[index] + 4.0 * taken, quota, largest=False).indices
            picked.append(best)
            taken = taken | (positions[:, None] == best[None]).any(dim=1)
            left -= quota
        return ascending(torch.cat(picked))

    def _prompt_pivots(self, prompt: torch.Tensor) -> torch.Tensor:
        # The repeated prompt is long enough for any number of pivots. Each repetition ranks below the previous one, so that no
        # token is taken twice before every token is taken once.
        if not self._text_pivots:
            return prompt[:0]
        norms = prompt.float().abs().sum(dim=1)
        below = torch.arange(self._text_pivots, device=prompt.device)[:, None] * (norms.amax(dim=0) + 1)
        best = torch.topk((norms[None] - below).flatten(), self._text_pivots).indices
        return prompt.repeat(self._text_pivots, 1).index_select(0, best)
