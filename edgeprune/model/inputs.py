"""Token embeddings as wide as the visual tokens are: with planes (DeepStack), to which text adds nothing.

The input cut: which visual tokens enter the decoder, and what they are then. A graph of its own, run for image turns only.

Standing between vision encoder and decoder it sees a constant number of tokens, so that greedy selections need no care for steps
without an image, and the decoder's prefill is shorter from layer 0 on.
"""

from __future__ import annotations

import torch
from torch import nn

from edgeprune.families.base import DecoderParts
from edgeprune.methods.base import InputView, Merging
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.registry import method_class


class TextEmbedding(nn.Module):
    """From ids [1, n] to embeddings [1, n, (1 + planes) * hidden]."""

    def __init__(self, parts: DecoderParts) -> None:
        super().__init__()
        self.table = parts.embed_tokens
        self.added = parts.planes * parts.hidden

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings, zero in their planes."""
        embeds: torch.Tensor = self.table(ids)
        return nn.functional.pad(embeds, (0, self.added)) if self.added else embeds


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
        return self._kept(visual, prompt, attention, keys, None)

    def _kept(
        self,
        visual: torch.Tensor,
        prompt: torch.Tensor,
        attention: torch.Tensor | None,
        keys: torch.Tensor | None,
        order: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        alone = visual.shape[2] == self.hidden
        tokens, words = (visual, prompt) if alone else (visual[..., : self.hidden], prompt[..., : self.hidden])
        view = InputView(tokens[0], words[0], attention, keys, order)
        chosen = self.method.select(view, self.cut.keep)
        if not isinstance(self.method, Merging):
            return visual.index_select(1, chosen), chosen
        merged = self.method.merge(view, chosen)[None]
        return merged if alone else torch.cat([merged, visual[..., self.hidden :].index_select(1, chosen)], dim=2), chosen


class ThinnedSelector(InputSelector):
    """An input cut behind cuts inside the vision encoder: it sees only the tokens that those have left."""

    def forward(  # type: ignore[override]
        self,
        visual: torch.Tensor,
        prompt: torch.Tensor,
        order: torch.Tensor,
        attention: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same as InputSelector, for tokens whose indices in the image are `order` [V]; those returned are, too."""
        embeds, chosen = self._kept(visual, prompt, attention, keys, order)
        return embeds, order.index_select(0, chosen)


def input_selector(plan: KeepPlan, hidden: int) -> InputSelector:
    """Return the input cut of a plan that has one."""
    assert plan.input is not None
    kind = ThinnedSelector if plan.vision_cuts else InputSelector
    return kind(plan.input, plan.geometry, hidden)
