"""VisionZip: keep the tokens that the vision encoder attends to, and merge the rest into a few contextual ones.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025, arXiv 2412.04467. Dominant tokens
receive the most attention in the encoder's penultimate block. Of the others, every n-th becomes a contextual token, and each
remaining one is added to the contextual token of the most similar key, keys averaged over heads: a contextual token is its own
features plus the mean of those merged into it. They are merged before the projector where `InputView` has features.

Made static: no change needed. Departures: for encoders without a class token, attention is averaged over all queries; the class
token itself is not kept; the tokens of all views of an image are ranked together; tokens keep raster order and original positions,
where the authors append the contextual ones. Option contextual: their share of the budget, by default the authors' 10 of 64, 20 of
128 and 30 of 192.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from edgeprune.methods.base import InputView, ascending, cosine, rank
from edgeprune.plan import Cut, Geometry, Option


class VisionZip:
    """Keep dominant tokens and merged contextual ones."""

    sites: ClassVar[tuple[str, ...]] = ("input",)
    needs: ClassVar[tuple[str, ...]] = ("vision attention",)
    options: ClassVar[tuple[Option, ...]] = (
        Option("contextual", 0.15625, "share of the budget that merged tokens take", least=0.0, most=1.0, published=True),
    )

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        self._contextual = float(cut.settings(*self.options)["contextual"])

    def select(self, view: InputView, keep: int) -> torch.Tensor:
        """Return the ascending positions [min(keep, V)] of dominant tokens and contextual targets."""
        dominant, targets, _ = self._parts(view, min(keep, view.visual.shape[0]))
        return ascending(torch.cat([dominant, targets]))

    def merge(self, view: InputView, chosen: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [K, hidden] of the chosen tokens, with the dropped tokens merged into the contextual ones."""
        assert view.keys is not None
        _, targets, others = self._parts(view, chosen.shape[0])
        if not targets.shape[0] or not others.shape[0]:
            return view.visual.index_select(0, chosen)
        similarity = cosine(view.keys.index_select(0, others), view.keys.index_select(0, targets))
        nearest = targets.index_select(0, similarity.argmax(dim=1))  # [others] the target of each
        features = view.visual if view.features is None else view.features
        joined = (targets[:, None] == nearest[None]).to(features.dtype)  # [targets, others]
        added = joined @ features.index_select(0, others) / joined.sum(dim=1, keepdim=True).clamp_min(1)
        merged = view.project(features.index_select(0, targets) + added)
        return _replaced(view.visual, merged, targets, chosen)

    def _parts(self, view: InputView, keep: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Dominant tokens, contextual targets, and the remaining tokens, which are merged.
        assert view.attention is not None
        tokens = view.visual.shape[0]
        contextual = min(int(self._contextual * keep + 1e-9), keep - 1)
        order = rank(view.attention, tokens)
        dominant, left = order[: keep - contextual], ascending(order[keep - contextual :])
        at = np.arange(contextual) * (left.shape[0] // max(contextual, 1))
        rest = np.setdiff1d(np.arange(left.shape[0]), at)
        targets, others = (left.index_select(0, torch.from_numpy(places).to(left.device)) for places in (at, rest))
        return dominant, targets, others


def _replaced(visual: torch.Tensor, merged: torch.Tensor, targets: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    # The chosen rows of `visual`, with those of the targets replaced by the merged ones.
    is_target = (chosen[:, None] == targets[None]).to(visual.dtype)  # [K, targets]
    return torch.where(is_target.sum(dim=1, keepdim=True) > 0, is_target @ merged, visual.index_select(0, chosen))
