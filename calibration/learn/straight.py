"""Training of a learned selection through the frozen decoder, by straight-through choices.

The forward pass makes the method's own greedy choices. In the backward pass each of them is a softmax over the logarithms of the
gains, at a temperature that falls, with Gumbel noise that fades. A token's choice is its gate: it multiplies the exponential of
every attention score towards it. The loss is the KL divergence from the unpruned model on its own answers, so no labels are needed.
Only score and metric are trained; they begin with the closed form.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgeprune.calibration.learn.scenes import Listener, Scene, lost
from edgeprune.calibration.learn.training import Schedule, Trainee
from edgeprune.methods.base import represented
from edgeprune.methods.learned import MARGIN, Learned

EPOCHS = 8
HIDDEN = 16  # units of the score
TEMPERATURE = (1.0, 0.3)  # first and last
NOISE = 0.3  # of the Gumbel noise at first
_LEAST = 1e-6


class Chooser(Trainee):
    """Score and metric over standardized tokens, the parameters of training. `method`: the closed form, as it begins."""

    rate, batch = 3e-3, 4

    def __init__(self, method: Learned, mean: torch.Tensor, deviation: torch.Tensor, seed: int) -> None:
        super().__init__()
        generator, width = torch.Generator().manual_seed(seed), len(mean)
        theta, metric = (method.tensors[name].to(mean) for name in ("theta", "metric"))
        self.method = method
        self.mean, self.deviation = mean.float(), deviation.float()
        self.theta = nn.Parameter((theta * deviation).float())
        self.metric = nn.Parameter((metric * deviation[:, None]).float())
        self.hidden = nn.Parameter(torch.randn(width, HIDDEN, generator=generator).to(mean.device) * width**-0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(HIDDEN, device=mean.device))
        self.out = nn.Parameter(torch.zeros(HIDDEN, device=mean.device))
        self.begin()

    def forward(self, visual: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores [V] and places [V, n] of visual tokens [V, d] with indices `order` [V] in the image."""
        rows = (visual.float() - self.mean) / self.deviation
        scores = rows @ self.theta + functional.gelu(rows @ self.hidden + self.hidden_bias) @ self.out
        return scores, self.method.placed(functional.normalize(rows @ self.metric, dim=-1), order)

    @torch.no_grad()
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return score and metric of `edgeprune.methods.learned` by name, of the running means; they take tokens as they are."""
        theta, metric, hidden, bias, out = self.averages
        scale, moved = self.deviation[:, None], self.mean / self.deviation
        return {
            "theta": theta / self.deviation,
            "hidden": hidden / scale,
            "hidden_bias": bias - moved @ hidden,
            "out": out,
            "metric": metric / scale,
            "metric_bias": -moved @ metric,
        }


def straight_through(
    scores: torch.Tensor, places: torch.Tensor, keep: int, temperature: float, noise: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Return the gate [V] of the greedy choice of `keep` tokens: 0 or 1, with the gradients of a softmax.

    `noise()` [V] is added to the logarithms of the gains at each step.
    """
    similarity = places @ places.T
    nearest = torch.zeros_like(scores)
    gate = torch.zeros_like(scores)
    taken = torch.zeros_like(scores)  # -inf for those that are
    for step in range(keep):
        gains = scores + torch.log((MARGIN - nearest).clamp_min(_LEAST)) if step else scores
        gains = gains + noise() + taken
        soft = torch.softmax(gains / temperature, dim=0)
        best = gains.argmax()
        hard = functional.one_hot(best, len(scores)).to(soft.dtype)
        pick = hard + soft - soft.detach()
        gate = gate + pick
        taken = taken.masked_fill(hard > 0, float("-inf"))
        row = pick @ similarity
        nearest = torch.maximum(nearest, row) if step else row
    return gate


def choice_loss(
    listener: Listener, chooser: Chooser, schedule: Schedule, scene: Scene, done: float, rng: np.random.Generator
) -> torch.Tensor:
    """Return the divergence in nats an answer of the chooser's choice.

    `done`: the share of the training. `rng`: what to draw from.
    """
    keep = schedule.draw(rng)
    first, last = TEMPERATURE
    gates, logs = [], []
    for visual, order in zip(scene.images(len(chooser.mean)), torch.split(scene.order, list(scene.sizes)), strict=True):

        def noise(tokens: torch.Tensor = visual) -> torch.Tensor:
            return torch.from_numpy(rng.gumbel(size=len(tokens)) * NOISE * (1 - done)).to(tokens)

        scores, places = chooser(visual, order)
        gates.append(straight_through(scores, places, min(keep, len(visual)), first * (last / first) ** done, noise))
        chosen = torch.nonzero(gates[-1].detach().round())[:, 0]
        counts = torch.ones_like(scores).index_copy(0, chosen, represented(places, chosen).to(scores))
        logs.append(counts.log().detach())  # no path of the gradient
    added = torch.cat(logs) if schedule.weigh else None
    return lost(scene, listener.logits(scene, gate=torch.cat(gates), logs=added)).sum() / len(scene.asked)
