"""VisionZip: keep the tokens that the vision encoder attends to, and merge the rest into a few contextual ones.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025, arXiv 2412.04467. Dominant tokens
receive the most attention in the encoder's penultimate block. Of the others, evenly strided ones become contextual tokens, and each
remaining one is averaged into the contextual token with the most similar key.

Made static: no change needed. Departures: for encoders without a class token, attention is averaged over all queries; tokens keep
raster order and original positions, where the paper appends the contextual ones. Option contextual: their share of the budget.
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
        Option("contextual", 0.15, "share of the budget that merged tokens take", least=0.0, most=1.0),
    )

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        self._contextual = float(cut.settings(*self.options)["contextual"])

    def select(self, view: InputView, keep: int) -> torch.Tensor:
        """Return the ascending positions [min(keep, V)] of dominant tokens and contextual targets."""
        dominant, targets, _ = self._parts(view, min(keep, view.visual.shape[0]))
        return ascending(torch.cat([dominant, targets]))

    def merge(self, view: InputView, chosen: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [K, hidden] of the chosen tokens, with the dropped tokens averaged into the contextual ones."""
        assert view.keys is not None
        _, targets, others = self._parts(view, chosen.shape[0])
        if not targets.shape[0] or not others.shape[0]:
            return view.visual.index_select(0, chosen)
        similarity = cosine(view.keys.index_select(0, others), view.keys.index_select(0, targets))
        nearest = targets.index_select(0, similarity.argmax(dim=1))  # [others] the target of each
        joined = (chosen[:, None] == nearest[None]).to(view.visual.dtype)  # [K, others]
        total = view.visual.index_select(0, chosen) + joined @ view.visual.index_select(0, others)
        return total / (1 + joined.sum(dim=1, keepdim=True))

    def _parts(self, view: InputView, keep: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Dominant tokens, contextual targets, and the remaining tokens, which are merged.
        assert view.attention is not None
        tokens = view.visual.shape[0]
        contextual = min(int(self._contextual * keep), keep - 1)
        order = rank(view.attention, tokens)
        dominant, left = order[: keep - contextual], ascending(order[keep - contextual :])
        step = (tokens - keep + contextual) / max(contextual, 1)
        at = np.floor(np.arange(contextual) * step).astype(np.int64)
        rest = np.setdiff1d(np.arange(tokens - keep + contextual), at)
        targets, others = (left.index_select(0, torch.from_numpy(places).to(left.device)) for places in (at, rest))
        return dominant, targets, others
