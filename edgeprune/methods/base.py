"""What a method sees at its cut, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from edgeprune.plan import Cut, Geometry


@dataclass(frozen=True)
class View:
    """The visual tokens still alive where a cut acts.

    `order` [V]: their indices among the image's visual tokens, ascending. `attention()` [heads, V]: the share of attention that
    the last token of the prompt pays to each in the layer just run, softmaxed over all keys; computed only when called.
    V is 0 when the step carries no image.
    """

    order: torch.Tensor
    attention: Callable[[], torch.Tensor]


class Method(Protocol):
    """A pruning method, made for one cut and one geometry. `sites`: where it can act."""

    sites: ClassVar[tuple[str, ...]]

    def __init__(self, cut: Cut, geometry: Geometry) -> None: ...

    def score(self, view: View) -> torch.Tensor:
        """Return one number per visual token [V]; the cut keeps the highest."""
        ...


def keep_best(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Return the ascending positions [min(keep, V)] of the highest scores [V].

    Lowers to TopK twice: by score, then on the indices, since graphs for TensorRT have no Sort.
    """
    count = torch.sym_min(keep, scores.shape[0])  # type: ignore[no-untyped-call]  # torch leaves it untyped
    best = torch.topk(scores, count).indices
    return torch.topk(best, count, largest=False, sorted=True).values
