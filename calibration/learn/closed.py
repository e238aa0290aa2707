"""The closed form of a learned selection: a score by one ridge regression, and a metric by principal components.

With z = (v - μ)/σ over all visual tokens of the calibration images, the score is s = e·θᵀz / (deviation of θᵀz within images),
where θ is the ridge regression, within images, from z to the importance of a token (`Scene.importance`) with penalty λ. The metric
has the first principal components of z, each divided by its deviation to the power w: 0 leaves them as they are, 1 makes all of
them count alike. e, λ and w are settings that are searched on held-out images. What questions ask for is fitted to them afterwards
(`edgeprune.calibration.learn.asking`).

All of it follows from sums over the tokens, so images are streamed and memory does not grow with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

_TINY = 1e-6


@dataclass(frozen=True)
class Settings:
    """What is searched: `exponent` e, penalty `ridge` λ for each visual token and `whitening` w; `question`: the weight q.

    `position`: its share in what makes two tokens alike.
    """

    exponent: float = 0.5
    ridge: float = 0.002
    whitening: float = 0.5
    question: float = 0.0
    position: float = 0.0


# The values that a search compares, one setting after the other. Scales of the exponent differ most between models.
TRIES: dict[str, tuple[float, ...]] = {
    "whitening": (0.0, 0.5, 1.0),
    "exponent": (0.25, 0.5, 1.0, 1.5, 2.5),
    "ridge": (0.0002, 0.002, 0.02, 0.2),
}


@dataclass
class Sums:
    """Sums over visual tokens of width d, in float64: their `count`, `total` [d], `products` [d, d], the products `within` images
    [d, d], and `toward` [d], the products of tokens and importance within images.
    """

    count: int = 0
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    products: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    within: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    toward: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, visual: torch.Tensor, importance: torch.Tensor) -> None:
        """Add the tokens [V, d] of an image and their importance [V]."""
        rows, target = visual.double(), importance.double()
        centred = rows - rows.mean(dim=0)
        self.count += rows.shape[0]
        self.total = self.total + rows.sum(dim=0)
        self.products = self.products + rows.T @ rows
        self.within = self.within + centred.T @ centred
        self.toward = self.toward + centred.T @ (target - target.mean())

    @property
    def mean(self) -> torch.Tensor:
        """The mean μ [d] of the tokens."""
        return self.total / self.count

    @property
    def variance(self) -> torch.Tensor:
        """The variance [d] of the tokens, but for rounding."""
        return self.products.diagonal() / self.count - self.mean.square()

    @property
    def deviation(self) -> torch.Tensor:
        """The deviation σ [d] of the tokens; of what never changes it is large, so that it counts for nothing."""
        variance = self.variance
        constant = variance <= _TINY * variance.max()
        return torch.where(constant, variance.max().clamp_min(_TINY) * 1e6, variance).sqrt()


def closed_form(sums: Sums, settings: Settings, rank: int) -> dict[str, torch.Tensor]:
    """Return the tensors of `edgeprune.methods.learned` that follow from the sums, by name."""
    mean, deviation = sums.mean, sums.deviation
    scale = deviation[:, None] * deviation[None]
    within = sums.within / scale
    penalty = settings.ridge * sums.count * torch.eye(len(mean), dtype=within.dtype, device=within.device)
    theta = torch.linalg.solve(within + penalty, sums.toward / deviation)
    spread = (theta @ within @ theta / sums.count).clamp_min(_TINY**2).sqrt()
    theta = settings.exponent * theta / spread / deviation
    covariance = (sums.products / sums.count - mean[:, None] * mean[None]) / scale
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    values = values.clamp_min(_TINY * values[0])
    metric = vectors * values.pow(-settings.whitening / 2) / deviation[:, None]
    places = {"metric": metric, "metric_bias": -mean @ metric}
    return {"theta": theta, **places, **_nothing_hidden(theta), **_nothing_asked(theta, metric.shape[1])}


def _nothing_hidden(theta: torch.Tensor) -> dict[str, Any]:
    return {"hidden": theta.new_zeros(len(theta), 1), "hidden_bias": theta.new_zeros(1), "out": theta.new_zeros(1)}


def _nothing_asked(theta: torch.Tensor, rank: int) -> dict[str, Any]:
    return {"mean_word": torch.zeros_like(theta), "words": theta.new_zeros(len(theta), 1), "asked": theta.new_zeros(rank, 1)}
