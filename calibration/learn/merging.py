"""Training of the option merge through the frozen decoder: what kept tokens gain of the dropped ones nearest to them.

The selection is learned before and stays. Its map begins as one that adds nothing, and the loss is the KL divergence from the
unpruned model on its own answers, so no labels are needed. Everything between the map and the answers is smooth, so unlike the
training of the choice this takes no estimate of a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from edgeprune.calibration.learn.closed import Sums
from edgeprune.calibration.learn.heldout import alike, replaced
from edgeprune.calibration.learn.scenes import Listener, Scene, Shown, lost
from edgeprune.calibration.learn.training import Schedule, Trainee
from edgeprune.methods.learned import Learned, take_in

INNER = 64  # dimensions that the map goes through
EPOCHS = 4  # 8 take twice as long, and answers are no better
POWER = 0.5  # of the number of tokens that a kept one stands for, at first


class Merger(Trainee):
    """The map over standardized tokens, the parameters of training. `sums`: of the tokens."""

    rate, batch, averaged = 2e-3, 2, 0.95

    def __init__(self, sums: Sums, seed: int) -> None:
        super().__init__()
        mean, deviation = sums.mean.float(), sums.deviation.float()
        self.mean, self.deviation, self.scale = mean, deviation, sums.variance.clamp_min(0).sqrt().float()
        width, generator = len(mean), torch.Generator().manual_seed(seed)

        def drawn() -> nn.Parameter:
            return nn.Parameter(torch.randn(width, INNER, generator=generator).to(mean.device) * (3 * width) ** -0.5)

        def nothing(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=mean.device))

        self.own, self.near, self.mattering = drawn(), drawn(), drawn()
        self.merge_bias = nothing(INNER)
        self.added, self.added_bias = nothing(INNER, width), nothing(width)
        self.attended, self.attended_bias = nothing(INNER), nothing(1)
        self.power = nn.Parameter(torch.full((1,), POWER, device=mean.device))
        self.begin()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the option by name, which take tokens as they are, with gradients."""
        return self._folded(dict(self.named_parameters()))

    @torch.no_grad()
    def averaged_tensors(self) -> dict[str, torch.Tensor]:
        """Return the same of the running means."""
        names = (name for name, _ in self.named_parameters())
        return self._folded(dict(zip(names, self.averages, strict=True)))

    def _folded(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inverse = 1 / self.deviation[:, None]
        return {
            **given,
            **{name: given[name] * inverse for name in ("own", "near", "mattering")},
            "merge_bias": given["merge_bias"] - (self.mean / self.deviation) @ given["own"],
            "added": given["added"] * self.scale,
            "added_bias": given["added_bias"] * self.scale,
        }


def adding_nothing(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of the option with which kept tokens stay as they are, and count as often as they stand for."""
    silent = {name: torch.zeros_like(tensors[name]) for name in ("added", "added_bias", "attended", "attended_bias")}
    inner = {name: tensors[name] for name in ("own", "near", "mattering", "merge_bias")}
    return inner | silent | {"power": torch.ones_like(tensors["power"])}


def merging_loss(
    listener: Listener, merger: Merger, method: Learned, schedule: Schedule, scene: Scene, done: float, rng: np.random.Generator
) -> torch.Tensor:
    """Return the divergence in nats an answer of `method`'s choice with what the merger makes of it. `rng`: what to draw from."""
    del done
    width, tensors = len(merger.mean), merger.tensors()
    choices, shown = alike(method, scene, width, schedule.draw(rng)), list[Shown]()
    for choice in choices:
        visual, logs = scene.visual.embeds, list[torch.Tensor]()
        for start, view, chosen in choice.images:
            tokens = view.visual
            nearest, matter = method.nearest(view, chosen), method.matter(tokens)
            near, mattering = tokens @ tensors["near"], tokens @ tensors["mattering"]
            kept, log = take_in(tokens.index_select(0, chosen), chosen, nearest, matter, near, mattering, tensors)
            logs.append(log)
            visual = replaced(visual, start + chosen, kept)
        shown.append(choice.shown(scene, visual, torch.cat(logs) if schedule.weigh else None))
    answers = zip(choices, listener.answers(scene.prefix, shown), strict=True)
    parts = [lost(scene.only(choice.numbers), logits).sum() for choice, logits in answers]
    return torch.stack(parts).sum() / len(scene.asked)
