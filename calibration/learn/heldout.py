"""How close a selection stays to the unpruned model on held-out images: its KL divergence, for the search and for the gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from edgeprune.calibration.learn.closed import TRIES, Settings
from edgeprune.calibration.learn.scenes import Asked, Listener, Scene, lost
from edgeprune.methods.base import InputView, represented

Select = Callable[[InputView, int], torch.Tensor]
Places = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class HeldOut:
    """Held-out images. `width`: columns of a visual token that methods see."""

    listener: Listener
    scenes: Sequence[Callable[[], Scene]]
    width: int

    @torch.no_grad()
    def divergence(self, select: Select, keeps: Sequence[int], most: int | None = None, *, places: Places | None = None) -> float:
        """Return the mean divergence in nats an answer of a selection, over questions and `keeps`; of the first `most` images.

        `places`: the metric of a cut that weighs.
        """
        total, questions = 0.0, 0
        for load in self.scenes[:most]:
            scene = load()
            visual = scene.images(self.width)
            for keep in keeps:
                for chosen, numbers in _alike(select, scene, visual, keep):
                    some = scene.only(numbers)
                    counts = None if places is None else _counts(places, scene, visual, chosen)
                    total += float(lost(some, self.listener.logits(some, chosen=chosen, counts=counts)).sum())
            questions += len(scene.asked) * len(keeps)
        return total / questions


def search(score: Callable[[Settings], float], progress: Callable[[int], None]) -> tuple[Settings, float]:
    """Return the settings of the least score, and that score: one setting after the other takes the best of its TRIES."""
    best, known = Settings(), dict[Settings, float]()

    def measured(settings: Settings) -> float:
        if settings not in known:
            known[settings] = score(settings)
            progress(len(known))
        return known[settings]

    for name, values in TRIES.items():
        changes: list[dict[str, Any]] = [{name: value} for value in values]
        best = min([best, *(replace(best, **change) for change in changes)], key=measured)
    return best, known[best]


MOST_TRIED = 1 + sum(len(values) - 1 for values in TRIES.values())  # the defaults are among the values


def _alike(select: Select, scene: Scene, visual: Sequence[torch.Tensor], keep: int) -> list[tuple[torch.Tensor, list[int]]]:
    # Questions with the same choice go through the decoder together. Each image has a choice of its own.
    starts = np.cumsum([0, *scene.sizes[:-1]]).tolist()
    groups: dict[tuple[int, ...], list[int]] = {}
    chosen: dict[tuple[int, ...], torch.Tensor] = {}
    for index, asked in enumerate(scene.asked):
        found = torch.cat([start + select(_view(tokens, asked), keep) for start, tokens in zip(starts, visual, strict=True)])
        key = tuple(found.tolist())
        groups.setdefault(key, []).append(index)
        chosen[key] = found
    return [(chosen[key], group) for key, group in groups.items()]


def _counts(places: Places, scene: Scene, visual: Sequence[torch.Tensor], chosen: torch.Tensor) -> torch.Tensor:
    # How many tokens of its image each chosen one stands for.
    kept = torch.zeros(sum(scene.sizes), dtype=torch.bool, device=chosen.device).index_fill(0, chosen, True)
    of_each = torch.split(kept, list(scene.sizes))
    return torch.cat([represented(places(tokens), torch.nonzero(of)[:, 0]) for tokens, of in zip(visual, of_each, strict=True)])


def _view(visual: torch.Tensor, asked: Asked) -> InputView:
    return InputView(visual, asked.words[:, : visual.shape[1]])
