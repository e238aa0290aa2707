"""Training of a learned selection through the frozen decoder, by straight-through choices.

The forward pass makes the method's own greedy choices. In the backward pass each of them is a softmax over the logarithms of the
gains, at a temperature that falls, with Gumbel noise that fades. A token's choice is its gate: it multiplies the exponential of
every attention score towards it. The loss is the KL divergence from the unpruned model on its own answers, so no labels are needed.
Only score and metric are trained; they begin with the closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgeprune.calibration.learn.scenes import Listener, Scene, lost
from edgeprune.io.files import write_bytes
from edgeprune.methods.base import represented
from edgeprune.methods.learned import MARGIN

HIDDEN = 16  # units of the score
BATCH = 4  # images of one step
RATE = 3e-3
TEMPERATURE = (1.0, 0.3)  # first and last
NOISE = 0.3  # of the Gumbel noise at first
AVERAGED = 0.97  # of the running mean of the parameters stays at each step
SAVE_EVERY = 20  # steps
_LEAST = 1e-6


class Trainee(nn.Module):
    """Score and metric over standardized tokens, the parameters of training. `start`: tensors of the closed form."""

    def __init__(self, start: dict[str, torch.Tensor], mean: torch.Tensor, deviation: torch.Tensor, seed: int) -> None:
        super().__init__()
        generator, width = torch.Generator().manual_seed(seed), len(mean)
        self.mean, self.deviation = mean.float(), deviation.float()
        self.theta = nn.Parameter((start["theta"] * deviation).float())
        self.metric = nn.Parameter((start["metric"] * deviation[:, None]).float())
        self.hidden = nn.Parameter(torch.randn(width, HIDDEN, generator=generator).to(mean.device) * width**-0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(HIDDEN, device=mean.device))
        self.out = nn.Parameter(torch.zeros(HIDDEN, device=mean.device))
        self.averages = [parameter.detach().clone() for parameter in self.parameters()]

    @torch.no_grad()
    def average(self) -> None:
        """Move the running means a little towards the parameters: single steps are noisy."""
        for mean, parameter in zip(self.averages, self.parameters(), strict=True):
            mean.lerp_(parameter, 1 - AVERAGED)

    def forward(self, visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores [V] and places [V, rank] of visual tokens [V, d]."""
        rows = (visual.float() - self.mean) / self.deviation
        scores = rows @ self.theta + functional.gelu(rows @ self.hidden + self.hidden_bias) @ self.out
        return scores, functional.normalize(rows @ self.metric, dim=-1)

    @torch.no_grad()
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of `edgeprune.methods.learned` by name, of the running means; they take tokens as they are."""
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


@dataclass(frozen=True)
class Schedule:
    """How long training takes: `steps` of BATCH images, for selections of each of `keeps` tokens in turn.

    `weigh`: whether the decoder attends to kept tokens by how many they stand for, which is no path of the gradient.
    """

    steps: int
    keeps: tuple[int, ...]
    seed: int
    weigh: bool = False


def train(
    listener: Listener,
    scenes: Sequence[Callable[[], Scene]],
    trainee: Trainee,
    schedule: Schedule,
    state: Path,
    progress: Callable[[int, float], None],
) -> Trainee:
    """Train in place and return the trainee. `state`: where it is kept now and then; an interrupted run goes on from there.

    `progress` is given the steps done and the mean loss in nats an answer of the last ones.
    """
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=RATE, weight_decay=0.0)
    begun, losses = _resume(state, trainee, optimizer), list[float]()
    for step in range(begun, schedule.steps):
        done = step / schedule.steps
        rng = np.random.default_rng([schedule.seed, step])  # of each step, so that a resumed run draws the same
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / 5 + 0.2) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        for number in _drawn(schedule, step, len(scenes)):
            loss = _loss(listener, scenes[number](), trainee, schedule, done, rng)
            (loss / BATCH).backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss.detach()))
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trainee.average()
        progress(step + 1, float(np.mean(losses[-8 * BATCH :])))
        if (step + 1) % SAVE_EVERY == 0:
            _save(state, step + 1, trainee, optimizer)
    return trainee


def _drawn(schedule: Schedule, step: int, count: int) -> list[int]:
    # Every image once before any comes again.
    places = range(step * BATCH, (step + 1) * BATCH)
    rounds = {place // count for place in places}
    orders = {each: np.random.default_rng([schedule.seed, 1 << 20, each]).permutation(count) for each in rounds}
    return [int(orders[place // count][place % count]) for place in places]


def _loss(
    listener: Listener, scene: Scene, trainee: Trainee, schedule: Schedule, done: float, rng: np.random.Generator
) -> torch.Tensor:
    keep = schedule.keeps[rng.integers(len(schedule.keeps))]
    first, last = TEMPERATURE
    gates, counts = [], []
    for visual in scene.images(len(trainee.mean)):

        def noise(tokens: torch.Tensor = visual) -> torch.Tensor:
            return torch.from_numpy(rng.gumbel(size=len(tokens)) * NOISE * (1 - done)).to(tokens)

        scores, places = trainee(visual)
        gates.append(straight_through(scores, places, min(keep, len(visual)), first * (last / first) ** done, noise))
        chosen = torch.nonzero(gates[-1].detach().round())[:, 0]
        counts.append(torch.ones_like(scores).index_copy(0, chosen, represented(places, chosen).to(scores)).detach())
    weights = torch.cat(counts) if schedule.weigh else None
    return lost(scene, listener.logits(scene, gate=torch.cat(gates), counts=weights)).sum() / len(scene.asked)


def _save(path: Path, step: int, trainee: Trainee, optimizer: torch.optim.Optimizer) -> None:
    from safetensors.torch import save

    tensors = {f"trainee.{name}": tensor for name, tensor in trainee.state_dict().items()}
    tensors |= {f"average.{number}": tensor for number, tensor in enumerate(trainee.averages)}
    for number, kept in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in kept.items()}
    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"step": str(step)}))


def _resume(path: Path, trainee: Trainee, optimizer: torch.optim.Optimizer) -> int:
    # The step that a saved state goes on with, 0 without one.
    from safetensors import safe_open

    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is not iterable
    prefix = "trainee."
    trainee.load_state_dict({name[len(prefix) :]: each for name, each in tensors.items() if name.startswith(prefix)})
    device = trainee.mean.device
    trainee.averages = [tensors[f"average.{number}"].to(device) for number in range(len(trainee.averages))]
    kept: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, field = name.split(".")
            kept.setdefault(int(number), {})[field] = tensor
    optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})
    return step
