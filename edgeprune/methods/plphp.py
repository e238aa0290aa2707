"""PLPHP: every layer keeps as much of its visual KV cache as it attends to vision, every head its own tokens.

Meng et al., "PLPHP: Per-Layer Per-Head Vision Token Pruning for Efficient Large Vision-Language Models", arXiv 2502.14504. A
layer's vision attention score decides its retention rate (section on layer-level allocation; see
`edgeprune.calibration.allocation`); inside a layer each head keeps the visual tokens that the last prompt token attends to most.

Made static: the rate of each layer is frozen from a calibration set, where the paper picks a class per input. Reconstruction: the
paper says nothing about grouped queries; the query heads that share a KV head are averaged (option reduce = "mean") or their
maximum counts ("max"). Option rows = "text" asks every token of the instruction instead of the last one. Prefill is untouched, the
cache shrinks. Ranks descend, so a smaller budget is a prefix of a larger one.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.errors import PlanError
from edgeprune.methods.base import LayerView
from edgeprune.plan import Cut, Geometry

REDUCTIONS = ("mean", "max")


class PLPHP:
    """Rank the visual tokens of each KV head by the attention of the last prompt token."""

    sites: ClassVar[tuple[str, ...]] = ("cache",)
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        settings = cut.settings(reduce="mean", rows="last")
        self._reduce, self._rows = settings["reduce"], settings["rows"]
        if self._reduce not in REDUCTIONS or self._rows not in ("last", "text"):
            raise PlanError(f"{cut} knows reduce = mean or max, and rows = last or text.")

    def score_heads(self, view: LayerView) -> torch.Tensor:
        """Return the attention [kv heads, V] of the query heads that share a KV head."""
        rows = view.attention() if self._rows == "last" else view.text_attention().mean(dim=1)  # [heads, V]
        grouped = rows.view(view.kv_heads, rows.shape[0] // view.kv_heads, rows.shape[1])
        reduced: torch.Tensor = grouped.mean(dim=1) if self._reduce == "mean" else grouped.amax(dim=1)
        return reduced


def vision_attention_score(attention: torch.Tensor) -> torch.Tensor:
    """Return gamma, the share of its attention that the last prompt token pays to vision, averaged over heads [heads, V] -> scalar.

    Reconstruction: the paper's formula for the score was not available to us.
    """
    return attention.sum(dim=1).mean()
