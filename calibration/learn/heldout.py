"""How close a selection stays to the unpruned model on held-out images: its KL divergence, for the search and for the gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from edgeprune.calibration.learn.closed import TRIES, Settings
from edgeprune.calibration.learn.scenes import Listener, Scene, Shown, lost
from edgeprune.methods.base import InputMethod, InputView, Merging, log_weights
from edgeprune.model import Segment


@dataclass(frozen=True)
class Choice:
    """What a method keeps of a scene for some of its questions, by their `numbers`.

    `images`: of each image, the index of its first token in the scene, what the method sees of it, and the ascending positions [K]
    of the tokens that stay.
    """

    numbers: list[int]
    images: list[tuple[int, InputView, torch.Tensor]]

    @property
    def chosen(self) -> torch.Tensor:
        """The indices of all kept tokens in the scene."""
        return torch.cat([start + chosen for start, _, chosen in self.images])

    def shown(self, scene: Scene, visual: torch.Tensor, logs: torch.Tensor | None) -> Shown:
        """Return what the decoder is given: of all visual tokens [1, V, d] of the scene those chosen, and `logs` [K] of them."""
        chosen = self.chosen
        seen = Segment(visual.index_select(1, chosen), scene.visual.positions.index_select(1, chosen))
        return Shown(tuple(scene.asked[number] for number in self.numbers), seen, chosen, logs)


@dataclass
class HeldOut:
    """Held-out images. `width`: columns of a visual token that methods see."""

    listener: Listener
    scenes: Sequence[Callable[[], Scene]]
    width: int

    def divergence(self, method: InputMethod, keeps: Sequence[int], most: int | None = None, *, weigh: bool = False) -> float:
        """Return the mean divergence in nats an answer under a method, over questions and `keeps`; of the first `most` images.

        `weigh`: the decoder attends to each kept token by how many it stands for.
        """
        return self.divergences(method, keeps, most, weigh=weigh)[0]

    @torch.no_grad()
    def divergences(
        self, method: InputMethod, keeps: Sequence[int], most: int | None = None, *, weigh: bool = False
    ) -> tuple[float, float]:
        """Return the same, and the mean of each answer's divergence in nats a token: one word counts as much as a description."""
        total, of_tokens, questions = 0.0, 0.0, 0
        for load in self.scenes[:most]:
            scene = load()
            for keep in keeps:
                choices = alike(method, scene, self.width, keep)
                shown = [_shown(method, scene, choice, weigh=weigh) for choice in choices]
                for choice, logits in zip(choices, self.listener.answers(scene.prefix, shown), strict=True):
                    some = scene.only(choice.numbers)
                    answers = torch.split(lost(some, logits), [asked.tokens for asked in some.asked])
                    total += sum(float(each.sum()) for each in answers)
                    of_tokens += sum(float(each.mean()) for each in answers)
            questions += len(scene.asked) * len(keeps)
        return total / questions, of_tokens / questions


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


def alike(method: InputMethod, scene: Scene, width: int, keep: int) -> list[Choice]:
    """Return what a method keeps of each of the images of a scene, of whose tokens it sees the first `width` columns.

    Questions with the same choice go through the decoder together.
    """
    starts = np.cumsum([0, *scene.sizes[:-1]]).tolist()
    found: dict[tuple[int, ...], Choice] = {}
    orders = torch.split(scene.order, list(scene.sizes))
    for number, asked in enumerate(scene.asked):
        shown = zip(scene.images(width), orders, strict=True)
        views = [InputView(tokens, asked.words[:, :width], kept=order) for tokens, order in shown]
        chosen = [method.select(view, keep) for view in views]
        choice = Choice([number], list(zip(starts, views, chosen, strict=True)))
        found.setdefault(tuple(choice.chosen.tolist()), replace(choice, numbers=[])).numbers.append(number)
    return list(found.values())


def _shown(method: InputMethod, scene: Scene, choice: Choice, *, weigh: bool) -> Shown:
    visual, logs = scene.visual.embeds, list[torch.Tensor]()
    for start, view, chosen in choice.images:
        if isinstance(method, Merging) and getattr(method, "merges", True):
            visual = replaced(visual, start + chosen, method.merge(view, chosen))
        logs += [log_weights(method, view, chosen)] if weigh else []
    return choice.shown(scene, visual, torch.cat(logs) if weigh else None)


def replaced(visual: torch.Tensor, chosen: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """Return visual tokens [1, V, d] with other first columns [K, width] of the chosen [K]; columns behind them are planes."""
    rows = torch.cat([embeds, visual[0, :, embeds.shape[1] :].index_select(0, chosen)], dim=1)
    return visual.index_copy(1, chosen, rows[None])
