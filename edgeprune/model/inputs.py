"""The decoder's inputs: text embeddings, and the input cut, which selects the visual tokens that enter the decoder.

The input cut is a graph of its own that runs only for prompts with an image. It sits between vision encoder and decoder, where the
number of tokens is constant: greedy selections need not handle steps without an image, and prefill is shorter from layer 0 on.
Text embeddings are as wide as the visual tokens; in DeepStack planes they are zero.
"""

from __future__ import annotations

import torch
from torch import nn

from edgeprune.bundle.graph_io import SIGNALS
from edgeprune.families.base import DecoderParts, Family
from edgeprune.methods.base import InputView, Merging, log_weights
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.registry import method_class


class TextEmbedding(nn.Module):
    """Embed ids [1, n] as [1, n, (1 + planes) * hidden]."""

    def __init__(self, parts: DecoderParts) -> None:
        super().__init__()
        self.table = parts.embed_tokens
        self.added = parts.planes * parts.hidden

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings, with zeros in the planes."""
        embeds: torch.Tensor = self.table(ids)
        return nn.functional.pad(embeds, (0, self.added)) if self.added else embeds


class InputSelector(nn.Module):
    """Apply one input cut to the visual tokens of an image; `projector` makes visual tokens of features, if these are given."""

    def __init__(self, cut: Cut, geometry: Geometry, hidden: int, projector: nn.Module | None = None) -> None:
        super().__init__()
        self.cut, self.hidden = cut, hidden
        self.projector = nn.Identity() if projector is None else projector
        self.method = method_class(cut.method)(cut, geometry)
        self.weighs = bool(cut.options.get("weigh"))

    def forward(
        self,
        visual: torch.Tensor,
        prompt: torch.Tensor,
        attention: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return the kept embeddings [1, K, width] and their indices [K], given `visual` [1, V, width] and `prompt` [1, M, width].

        If the cut weighs, the logarithms of how many tokens each of them stands for [K] are the third.

        Methods receive and merge the tokens without their planes; the planes of kept tokens are kept unchanged. `attention` [V],
        `keys` [V, key dim] and `features` [V, width] come from the vision encoder, for methods that need them.
        """
        return self._select(visual, prompt, (attention, keys, features), None)

    def _select(
        self,
        visual: torch.Tensor,
        prompt: torch.Tensor,
        signals: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
        order: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        without_planes = visual.shape[2] == self.hidden
        tokens, text = (visual, prompt) if without_planes else (visual[..., : self.hidden], prompt[..., : self.hidden])
        view = InputView(tokens[0], text[0], *signals, project=self.projector, kept=order)
        chosen = self.method.select(view, self.cut.keep)
        if isinstance(self.method, Merging) and getattr(self.method, "merges", True):
            kept = self.method.merge(view, chosen)[None]
            kept = kept if without_planes else torch.cat([kept, visual[..., self.hidden :].index_select(1, chosen)], dim=2)
        else:
            kept = visual.index_select(1, chosen)
        return (kept, chosen, log_weights(self.method, view, chosen)) if self.weighs else (kept, chosen)


class ThinnedSelector(InputSelector):
    """An input cut after cuts inside the vision encoder: it receives only the tokens that those kept."""

    def forward(  # type: ignore[override]
        self,
        visual: torch.Tensor,
        prompt: torch.Tensor,
        order: torch.Tensor,
        attention: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return the same as InputSelector for tokens with indices `order` [V] in the image; the returned indices [K] are too."""
        embeds, chosen, *weights = self._select(visual, prompt, (attention, keys, features), order)
        return embeds, order.index_select(0, chosen), *weights


def input_selector(plan: KeepPlan, hidden: int, projector: nn.Module | None = None) -> InputSelector:
    """Return the module of a plan's input cut; the plan must have one. `projector`: that of the features, if it is given these."""
    assert plan.input is not None
    kind = ThinnedSelector if plan.vision_cuts else InputSelector
    return kind(plan.input, plan.geometry, hidden, projector)


def signals_for(plan: KeepPlan, family: Family) -> tuple[str, ...]:
    """Return the names of the vision encoder's outputs, beside the visual tokens, that the plan's input cut needs."""
    if plan.input is None or not method_class(plan.input.method).needs:
        return ()
    return SIGNALS if family.projects_tokens else SIGNALS[:2]
