"""The input cut of a plan, also behind cuts inside the vision encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from edgeprune.methods.base import InputView, Merging
from edgeprune.model import InputSelector
from edgeprune.plan import KeepPlan


def input_selector(plan: KeepPlan, hidden: int) -> nn.Module:
    """Return the plan's input cut; where the vision encoder has cuts, it wants to know which tokens they left."""
    assert plan.input is not None
    selector = InputSelector(plan.input, plan.geometry, hidden)
    return ThinnedSelector(selector) if plan.vision_cuts else selector


class ThinnedSelector(nn.Module):
    """An input cut that sees only the tokens that the vision encoder has left."""

    def __init__(self, selector: InputSelector) -> None:
        super().__init__()
        self.selector = selector
        if not isinstance(selector.method, Merging):
            selector.method = _Placed(selector.method)

    def forward(
        self,
        visual: torch.Tensor,
        prompt: torch.Tensor,
        order: torch.Tensor,
        attention: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what InputSelector does, for visual tokens whose indices in the image are `order` [V]; so are those returned."""
        if isinstance(self.selector.method, _Placed):
            self.selector.method.order = order
        embeds, chosen = self.selector(visual, prompt, attention, keys)
        return embeds, order.index_select(0, chosen)


class _Placed:
    # A method that is told where in the image the tokens lie.
    def __init__(self, method: Any) -> None:
        self._method = method
        self.order: torch.Tensor | None = None

    def select(self, view: InputView, keep: int) -> torch.Tensor:
        chosen: torch.Tensor = self._method.select(replace(view, kept=self.order), keep)
        return chosen
