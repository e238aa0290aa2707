"""VTW: drop all visual tokens from some layer on.

Lin et al., "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference", AAAI 2025, arXiv
2405.05803. The layer is found offline, as in the authors' code (lzhxmu/VTW): the first one, of layer 5 and later ones, before
which KL(withdrawn || full), the divergence of the next-token distributions averaged over the samples, is at most eta nats. The
authors' eta is 0.003; for LLaVA-1.5-13B it is 0.0005, for LLaVA-1.6-Vicuna-7B 0.0001. With a budget (--keep) the layer is at that
share of the depth instead.

Made static: the method already is. Text tokens keep their positions.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeprune.errors import PlanError
from edgeprune.methods.base import LayerView, Scored
from edgeprune.plan import Cut, Geometry, Option


class VTW(Scored):
    """Keep no visual token."""

    sites: ClassVar[tuple[str, ...]] = ("layer",)
    attention: ClassVar[str] = ""
    calibration_options: ClassVar[tuple[Option, ...]] = (
        Option("eta", 0.003, "largest cost of a withdrawal in nats, without --keep", least=0.0, published=True),
        Option("first", 5, "first layer that is looked at, without --keep", least=1, published=True),
    )

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        cut.settings()
        if cut.keep:
            raise PlanError(f"{cut} withdraws every visual token; it cannot keep {cut.keep}.", hint="Say keep = 0.")

    def score(self, view: LayerView) -> torch.Tensor:
        """Return zeros [V], since no token is kept."""
        return torch.zeros_like(view.order, dtype=torch.float32)
