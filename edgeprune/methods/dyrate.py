"""DyRate: drop more visual tokens during generation, as the answer's attention to the image fades.

Liang et al., "Dynamic Token Reduction during Generation for Vision Language Models", arXiv 2501.14204. A light predictor on the
attention distribution picks the reduction rate at every decode step.

Reconstruction: the paper's features, bins and training were not available to us. Here the predictor is one linear layer over the
step and the newest token's shares of attention to system prompt, image, instruction and generated text in every layer. It picks
among fixed keep ratios (option form = "predictor"). Two other forms: the same rates frozen by step ("schedule"), and a monotone
map of the image's share of attention, a baseline without training ("map"). Reduction rates never fall within an answer.

Made static: cache cuts leave the visual tokens of each KV head in descending order of score, so a smaller budget is a prefix and
the graphs stay the same. The cache cut decides once, at the end of prefill, which tokens are dropped first.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from edgeprune.errors import PlanError
from edgeprune.plan import Cut, Geometry, Option

LAST_STEP = 128  # the step feature reaches 1 here
FORMS = {
    "schedule": {"form": "schedule", "monotone": True, "steps": [], "shares": []},
    "map": {"form": "map", "monotone": True, "attention": [], "shares": []},
    "predictor": {"form": "predictor", "monotone": True, "weight": [], "bias": [], "shares": []},
}


class DyRate:
    """The rate of a decode cut: keep one of `shares` of every layer's visual cache, by step, by attention or by a predictor."""

    sites: ClassVar[tuple[str, ...]] = ("decode",)
    needs: ClassVar[tuple[str, ...]] = ()
    calibration_options: ClassVar[tuple[Option, ...]] = (
        Option(
            "form", "predictor", "a trained predictor, a map of attention, or a schedule by step", ("predictor", "schedule", "map")
        ),
        Option("follow", False, "the share may also grow within an answer"),
        Option("prior", False, "rank caches also by where the samples' answers looked"),
    )

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        del geometry
        form = cut.options.get("form")
        if form not in FORMS:
            raise PlanError(
                f"{cut} has no form: {', '.join(FORMS)}.",
                hint="Make one: edgeprune calibrate MODEL --data FILE --method dyrate --budget 0.5 -o PLAN",
            )
        self.form: str = form
        self._settings = cut.settings(**FORMS[form])
        shares, counts = (
            self._settings["shares"],
            {name: len(value) for name, value in self._settings.items() if isinstance(value, list)},
        )
        expected = len(shares) - 1 if form == "map" else len(shares)
        if not shares or not all(0 <= share <= 1 for share in shares):
            raise PlanError(f"The shares of {cut} must be numbers from 0 to 1.")
        if any(count != (len(shares) if name == "shares" else expected) for name, count in counts.items()):
            raise PlanError(f"The settings of {cut} are not of one length: {counts}.")

    @property
    def follows_attention(self) -> bool:
        """Whether the rate depends on attention, so that a predictor is exported."""
        return self.form != "schedule"

    def rate_predictor(self) -> nn.Module:
        """Return the module that maps split [layers, 4] and step [1] to the kept share [1]."""
        values = self._settings
        shares = torch.tensor(values["shares"], dtype=torch.float32)
        if self.form == "map":
            return AttentionMap(torch.tensor(values["attention"], dtype=torch.float32), shares)
        return Predictor(torch.tensor(values["weight"]), torch.tensor(values["bias"]), shares)


class Predictor(nn.Module):
    """A linear classifier over keep shares."""

    shares: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, shares: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.register_buffer("shares", shares)

    def logits(self, split: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., bins] of split [..., layers, 4] and step [..., 1]."""
        scaled = torch.log(step + 1) / math.log(LAST_STEP + 1)
        return nn.functional.linear(torch.cat([split.flatten(-2), scaled], dim=-1), self.weight, self.bias)

    def forward(self, split: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Return the share [1] of the most likely bin."""
        # The added axis is for TensorRT, whose ArgMax requires two.
        return self.shares.index_select(0, self.logits(split, step)[None].argmax(dim=-1))

    def settings(self) -> dict[str, Any]:
        """Return the options of a cut with this predictor."""
        rounded = {"weight": self.weight, "bias": self.bias, "shares": self.shares}
        return {"form": "predictor", **{name: torch.round(t.detach().double(), decimals=5).tolist() for name, t in rounded.items()}}


class AttentionMap(nn.Module):
    """A training-free rate: the kept share is a step function of the image's share of attention, averaged over layers."""

    attention: torch.Tensor
    shares: torch.Tensor

    def __init__(self, attention: torch.Tensor, shares: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("attention", attention)
        self.register_buffer("shares", shares)

    def forward(self, split: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Return the share [1] for the interval that contains the image's share of attention."""
        del step
        above = (split[:, 1].mean() >= self.attention).sum().view(1)
        return self.shares.index_select(0, above)
