"""VTW: drop all visual tokens from some layer on.

Lin et al., "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference", AAAI 2025, arXiv
2405.05803. The layer is found offline: the first one where withdrawal hardly changes the next-token distribution.

Made static: the method already is. Text tokens keep their positions.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.errors import PlanError
from edgeprune.methods.base import LayerView, Scored
from edgeprune.plan import Cut, Geometry


class VTW(Scored):
    """Keep no visual token."""

    sites: ClassVar[tuple[str, ...]] = ("layer",)
    attention: ClassVar[str] = ""

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        cut.settings()
        if cut.keep:
            raise PlanError(f"{cut} withdraws every visual token; it cannot keep {cut.keep}.", hint="Say keep = 0.")

    def score(self, view: LayerView) -> torch.Tensor:
        """Return zeros [V], since no token is kept."""
        return torch.zeros_like(view.order, dtype=torch.float32)
