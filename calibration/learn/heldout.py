"""How close a selection stays to the unpruned model on held-out images: its KL divergence, for the search and for the gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from edgeprune.calibration.learn.closed import TRIES, Settings
from edgeprune.calibration.learn.scenes import Asked, Listener, Scene, lost
from edgeprune.methods.base import InputMethod, InputView, Merging, log_weights

@dataclass(frozen=True)
class Choice:
    """What a method keeps of a scene for some of its questions, by their `numbers`.

    `images`: of each image, the index of its first token in the scene, its tokens [V, width], and the ascending positions [K] of
    those that stay.
    """

    numbers: list[int]
    images: list[tuple[int, torch.Tensor, torch.Tensor]]

    @property
    def chosen(self) -> torch.Tensor:
        """The indices of all kept tokens in the scene."""
        return torch.cat([start + chosen for start, _, chosen in self.images])


@dataclass
class HeldOut:
    """Held-out images. `width`: columns of a visual token that methods see."""

    listener: Listener
    scenes: Sequence[Callable[[], Scene]]
    width: int

    @torch.no_grad()
    def divergence(self, method: InputMethod, keeps: Sequence[int], most: int | None = None, *, weigh: bool = False) -> float:
        """Return the mean divergence in nats an answer under a method, over questions and `keeps`; of the first `most` images.

        `weigh`: the decoder attends to each kept token by how many it stands for.
        """
        total, questions = 0.0, 0
        for load in self.scenes[:most]:
            scene = load()
            for keep in keeps:
                for choice in alike(method, scene, scene.images(self.width), keep):
                    some = scene.only(choice.numbers)
                    total += float(lost(some, self.listener.logits(some, **_kept(method, scene, choice, weigh=weigh))).sum())
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


def alike(method: InputMethod, scene: Scene, images: Sequence[torch.Tensor], keep: int) -> list[Choice]:
    """Return what a method keeps of each of the images [V, width] of a scene.

    Questions with the same choice go through the decoder together.
    """
    starts = np.cumsum([0, *scene.sizes[:-1]]).tolist()
    found: dict[tuple[int, ...], Choice] = {}
    for number, asked in enumerate(scene.asked):
        chosen = [method.select(_view(tokens, asked), keep) for tokens in images]
        choice = Choice([number], list(zip(starts, images, chosen, strict=True)))
        found.setdefault(tuple(choice.chosen.tolist()), replace(choice, numbers=[])).numbers.append(number)
    return list(found.values())


def _kept(method: InputMethod, scene: Scene, choice: Choice, *, weigh: bool) -> dict[str, torch.Tensor | None]:
    # What the decoder is given of a choice: `visual`, `chosen` and `logs` of `Listener.logits`.
    visual, logs = scene.visual.embeds, list[torch.Tensor]()
    for start, tokens, chosen in choice.images:
        view = _view(tokens, scene.asked[choice.numbers[0]])
        if isinstance(method, Merging) and getattr(method, "merges", True):
            visual = replaced(visual, start + chosen, method.merge(view, chosen))
        logs += [log_weights(method, view, chosen)] if weigh else []
    return {"visual": visual, "chosen": choice.chosen, "logs": torch.cat(logs) if weigh else None}


def _view(visual: torch.Tensor, asked: Asked) -> InputView:
    return InputView(visual, asked.words[:, : visual.shape[1]])


def replaced(visual: torch.Tensor, chosen: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """Return visual tokens [1, V, d] with other first columns [K, width] of the chosen [K]; columns behind them are planes."""
    rows = torch.cat([embeds, visual[0, :, embeds.shape[1] :].index_select(0, chosen)], dim=1)
    return visual.index_copy(1, chosen, rows[None])
