"""The loop that trains what a learned selection has to learn through the frozen decoder: steps, running means, interruptions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from edgeprune.calibration.learn.scenes import Scene
from edgeprune.io.files import write_bytes

WARMING = 5  # steps until the learning rate is the whole one
SAVE_EVERY = 20  # steps
RECENT = 32  # images whose mean loss is shown
FEWEST_STEPS, MOST_STEPS = 60, 400


class Trainee(nn.Module):
    """Parameters in training, and the running means of them, which are what is kept: single steps are noisy.

    `rate`: the learning rate of AdamW. `batch`: images of one step.
    """

    rate: ClassVar[float]
    batch: ClassVar[int]
    averaged: ClassVar[float] = 0.97  # of the running mean stays at each step
    averages: list[torch.Tensor]

    def begin(self) -> None:
        """Let the running means begin at the parameters."""
        self.averages = [parameter.detach().clone() for parameter in self.parameters()]

    @torch.no_grad()
    def average(self) -> None:
        """Move the running means a little towards the parameters."""
        for mean, parameter in zip(self.averages, self.parameters(), strict=True):
            mean.lerp_(parameter, 1 - self.averaged)


Loss = Callable[[Scene, float, np.random.Generator], torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long training takes: `steps`, each of some images, for selections of each of `keeps` tokens in turn.

    `weigh`: whether the decoder attends to kept tokens by how many they stand for.
    """

    steps: int
    keeps: tuple[int, ...]
    seed: int
    weigh: bool = False

    @classmethod
    def of(cls, epochs: int, images: int, batch: int, keeps: tuple[int, ...], seed: int, *, weigh: bool) -> Schedule:
        """Return the schedule that shows each of so many images so often, within bounds."""
        return cls(min(MOST_STEPS, max(FEWEST_STEPS, epochs * images // batch)), keeps, seed, weigh)

    def draw(self, rng: np.random.Generator) -> int:
        """Return how many tokens stay this time."""
        return self.keeps[rng.integers(len(self.keeps))]


def train(
    scenes: Sequence[Callable[[], Scene]],
    trainee: Trainee,
    loss: Loss,
    schedule: Schedule,
    state: Path,
    progress: Callable[[int, float], None],
) -> None:
    """Train in place. `state`: where the trainee is kept now and then; an interrupted run goes on from there.

    `loss` is given an image, the share of the training that is done, and what to draw from. `progress` is given the steps done and the mean loss in nats an answer of the last ones.
    """
    trainee.begin()
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=trainee.rate, weight_decay=0.0)
    begun, losses = _resume(state, trainee, optimizer), list[float]()
    for step in range(begun, schedule.steps):
        done = step / schedule.steps
        rng = np.random.default_rng([schedule.seed, step])  # of each step, so that a resumed run draws the same
        for group in optimizer.param_groups:
            group["lr"] = trainee.rate * min(1.0, step / WARMING + 0.2) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        for number in _drawn(schedule.seed, step, trainee.batch, len(scenes)):
            lost = loss(scenes[number](), done, rng)
            (lost / trainee.batch).backward()  # type: ignore[no-untyped-call]
            losses.append(float(lost.detach()))
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trainee.average()
        progress(step + 1, float(np.mean(losses[-RECENT:])))
        if (step + 1) % SAVE_EVERY == 0:
            _save(state, step + 1, trainee, optimizer)


def _drawn(seed: int, step: int, batch: int, count: int) -> list[int]:
    # Every image once before any comes again.
    places = range(step * batch, (step + 1) * batch)
    rounds = {place // count for place in places}
    orders = {each: np.random.default_rng([seed, 1 << 20, each]).permutation(count) for each in rounds}
    return [int(orders[place // count][place % count]) for place in places]


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
    device = next(trainee.parameters()).device
    trainee.averages = [tensors[f"average.{number}"].to(device) for number in range(len(trainee.averages))]
    kept: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, field = name.split(".")
            kept.setdefault(int(number), {})[field] = tensor
    optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})
    return step
