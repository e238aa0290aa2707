"""PLPHP: prune the visual KV cache, with a budget per layer by its attention to vision and separate tokens per head.

Meng et al., "PLPHP: Per-Layer Per-Head Vision Token Pruning for Efficient Large Vision-Language Models", arXiv 2502.14504. A
layer's vision attention score decides its retention rate (section on layer-level allocation; see
`edgeprune.calibration.allocate`). Each head of a layer keeps the visual tokens that the last prompt token attends to most.

Made static: the rate of each layer is frozen from a calibration set, where the paper picks a class per input. Prefill does not
change, the cache shrinks. Tokens are in descending order of score, so a smaller budget is a prefix of a larger one.

Reconstruction: the paper does not cover GQA. Query heads that share a KV head are averaged (option reduce = "mean") or the highest
counts ("max"). Our additions, off by default, since the last prompt token does not predict what a long answer will need:
rows = "text" averages over every token of the instruction; rows = "peak" alternates a token's highest attention from any of them
with its highest from any visual token; spread also alternates with an even lattice, shifted from head to head; prior alternates
with the order in which the answers of a calibration set attended to the image (one list of all tokens per KV head).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from edgeprune.errors import PlanError
from edgeprune.methods.base import LayerView
from edgeprune.methods.uniform import earliness, ranked
from edgeprune.plan import Cut, Geometry, Option


class PLPHP:
    """Rank the visual tokens of each KV head by the attention of the last prompt token."""

    sites: ClassVar[tuple[str, ...]] = ("cache",)
    needs: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "rows",
            "last",
            "whose attention ranks: the last prompt token's, all the text's, or peaks of text and image",
            ("last", "text", "peak"),
        ),
        Option("reduce", "mean", "how query heads that share a KV head count: by their mean or their maximum", ("mean", "max")),
        Option("spread", False, "rank also by an even lattice, shifted from head to head"),
    )
    calibration_options: ClassVar[tuple[Option, ...]] = (
        Option(
            "allocate",
            "classes",
            "the paper's classes, the least cost by measured divergence, or the same for all layers",
            ("classes", "least-cost", "even"),
        ),
        Option(
            "delta",
            None,
            "how far the classes' retention rates lie apart",
            least=0.0,
            most=1.0,
            kind="float",
            unset="half of keep, or of 1 - keep",
        ),
        Option("prior", False, "rank also by where the samples' answers looked"),
    )

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        settings = cut.settings(*self.options, prior=[])
        self._reduce, self._rows, self._spread = settings["reduce"], settings["rows"], settings["spread"]
        self._geometry = geometry
        if any(sorted(order) != list(range(geometry.tokens)) for order in settings["prior"]):
            raise PlanError(f"The prior of {cut} must list every visual token once for each KV head.")
        # The argsort of an order is each token's rank in it.
        self._prior = torch.tensor(settings["prior"], dtype=torch.int64).argsort(dim=-1).neg().float()

    def score_heads(self, view: LayerView) -> torch.Tensor:
        """Return a score per KV head and visual token [kv heads, V], the highest for the token to keep first."""
        rankings = [self._grouped(rows, view.kv_heads) for rows in self._attention(view)]
        if self._spread:
            rankings.append(self._lattice(view))
        if len(self._prior):
            rankings.append(self._prior.to(view.order.device).index_select(1, view.order))
        return rankings[0] if len(rankings) == 1 else in_turns(rankings)

    def _attention(self, view: LayerView) -> list[torch.Tensor]:
        if self._rows == "last":
            return [view.attention()]
        text = view.text_attention()  # [heads, T, V]
        if self._rows == "text":
            return [text.mean(dim=1)]
        # Without an image there is no visual row to take the maximum over, hence the row of zeros.
        visual = torch.cat([torch.zeros_like(text[:, :1]), view.visual_attention()], dim=1)
        return [text.amax(dim=1), visual.amax(dim=1)]

    def _grouped(self, rows: torch.Tensor, kv_heads: int) -> torch.Tensor:
        grouped = rows.view(kv_heads, rows.shape[0] // kv_heads, rows.shape[1])
        return grouped.mean(dim=1) if self._reduce == "mean" else grouped.amax(dim=1)

    def _lattice(self, view: LayerView) -> torch.Tensor:
        grids = [earliness(part) for part in self._geometry.layout]
        shifted = [ranked([np.roll(grid, (head, head), (0, 1)) for grid in grids]) for head in range(view.kv_heads)]
        return torch.from_numpy(np.stack(shifted)).to(view.order.device).index_select(1, view.order)


def in_turns(rankings: list[torch.Tensor]) -> torch.Tensor:
    """Return scores [..., V] that interleave several rankings [..., V]: the best token of each, then the second best, and so on."""
    count = rankings[0].shape[-1]
    turns = []
    for turn, scores in enumerate(rankings):
        # Sorting twice gives the inverse permutation, that is the rank of each token.
        order = torch.topk(scores, count).indices
        rank = torch.topk(order, count, largest=False).indices
        turns.append(rank * len(rankings) + turn)
    return -torch.stack(turns).amin(dim=0).float()


def vision_attention_score(attention: torch.Tensor) -> torch.Tensor:
    """Return gamma [], the last prompt token's share of attention [heads, V] to visual tokens, averaged over heads.

    Reconstruction: the paper's formula for the score was not available to us.
    """
    return attention.sum(dim=1).mean()
