"""The input cut: which visual tokens enter the decoder, and what they are then. A graph of its own, run for image turns only.

Standing between vision encoder and decoder it sees a constant number of tokens, so that greedy selections need no care for steps
without an image, and the decoder's prefill is shorter from layer 0 on.
"""

from __future__ import annotations

import torch
from torch import nn

from edgeprune.methods.base import InputView, Merging
from edgeprune.plan import Cut, Geometry
from edgeprune.registry import method_class


class InputSelector(nn.Module):
    """Apply one input cut to the visual tokens of an image."""

    def __init__(self, cut: Cut, geometry: Geometry, hidden: int) -> None:
        super().__init__()
        self.cut, self.hidden = cut, hidden
        self.method = method_class(cut.method)(cut, geometry)

    def forward(
        self, visual: torch.Tensor, prompt: torch.Tensor, attention: torch.Tensor | None = None, keys: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kept embeddings [1, K, width] and their indices [K] of visual [1, V, width] and prompt [1, M, width].

        Methods see, and merge, the tokens alone; planes beside them go along with the kept ones. `attention` [V] and `keys`
        [V, key dim] come from the vision encoder, for methods that need them.
        """
        alone = visual.shape[2] == self.hidden
        tokens, words = (visual, prompt) if alone else (visual[..., : self.hidden], prompt[..., : self.hidden])
        view = InputView(tokens[0], words[0], attention, keys)
        chosen = self.method.select(view, self.cut.keep)
        if not isinstance(self.method, Merging):
            return visual.index_select(1, chosen), chosen
        merged = self.method.merge(view, chosen)[None]
        return merged if alone else torch.cat([merged, visual[..., self.hidden :].index_select(1, chosen)], dim=2), chosen
