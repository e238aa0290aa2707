"""What questions ask for: the direction of visual tokens that matter to an answer, as a function of the question's words.

The closed form says how much tokens matter to all answers about an image. Here s = v·θ gains f·(δ + B g): f are the places of the
metric before they are normalized, and g the mean of the question's words, less that of all questions, in its first principal
components. δ and B are fitted at once: the softmax of s over an image is to be the share of each token in |v·∂L/∂v| of the answer
(`Scene.shares`; cross-entropy), with penalties on what δ adds to the score and on B. The problem is convex and small: it holds no
more of each image than f, and takes seconds. The ridge regression of the closed form predicts logarithms, in which all tokens count
alike; shares say which tokens matter most, and that is what questions differ in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from edgeprune.calibration.learn.scenes import Scene

WORDS = 40  # dimensions of words
PULL = 1.0  # penalty of the mean square of what δ adds to the score
SHRINK = 0.03  # penalty of the squares of B
EVALUATIONS = 200  # of the loss, at most
WEIGHTS = (1.0, 1.5, 2.0)  # q that a search compares with none
WORTH = 0.9  # of the divergence without: a choice for one question is none for the next about the same image
_TINY = 1e-6


@dataclass(frozen=True)
class Asking:
    """What was fitted: δ `shift` [r], B `asked` [r, w], and of words the `mean_word` ω [d] and C `words` [d, w]."""

    shift: torch.Tensor
    asked: torch.Tensor
    mean_word: torch.Tensor
    words: torch.Tensor

    def added_to(self, tensors: dict[str, torch.Tensor], exponent: float) -> dict[str, torch.Tensor]:
        """Return tensors of the closed form of this exponent with what was fitted."""
        theta = tensors["theta"] + exponent * tensors["metric"] @ self.shift
        return tensors | {"theta": theta, "asked": self.asked, "mean_word": self.mean_word, "words": self.words}


def fitted(scenes: Sequence[Callable[[], Scene]], width: int, tensors: dict[str, torch.Tensor], exponent: float) -> Asking:
    """Return the fit to the questions about some scenes. `tensors`: of the closed form of this exponent."""
    embedded = torch.cat([asked.words[:, :width].double() for load in scenes for asked in load().asked])
    mean_word = embedded.mean(dim=0)
    words = _components(embedded - mean_word, WORDS)
    theta, metric, bias = (tensors[name].float() for name in ("theta", "metric", "metric_bias"))
    rows = list[_Image]()
    for load in scenes:
        scene = load()
        means = torch.stack([asked.words[:, :width].double().mean(dim=0) for asked in scene.asked])
        asked = ((means - mean_word) @ words).float()
        for visual, shares in zip(scene.images(width), torch.split(scene.shares, list(scene.sizes), dim=1), strict=True):
            rows.append(_Image(visual.float() @ theta / exponent, visual.float() @ metric + bias, asked, shares))
    scale = torch.cat([row.asked for row in rows]).std(dim=0).amax(dim=0).clamp_min(_TINY)
    shift, matrix = _least(rows, scale)
    return Asking(shift.double(), (matrix / scale).double(), mean_word, words)


@dataclass(frozen=True)
class _Image:
    # Of an image: scores [V] of the closed form, places [V, r] (at run time without m, which adds the same to all tokens of an
    # image), its questions [n, w] and their shares [n, V].
    scores: torch.Tensor
    places: torch.Tensor
    asked: torch.Tensor
    shares: torch.Tensor


def _components(rows: torch.Tensor, most: int) -> torch.Tensor:
    # The first principal components [d, w] of rows [n, d].
    vectors: torch.Tensor = torch.linalg.eigh(rows.T @ rows).eigenvectors
    return vectors.flip(1)[:, :most]


def _least(rows: Sequence[_Image], scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # δ [r] and B [r, w] of the least loss.
    rank = rows[0].places.shape[1]
    shift, matrix = rows[0].places.new_zeros(rank), rows[0].places.new_zeros(rank, rows[0].asked.shape[1])
    centred = [row.places - row.places.mean(dim=0) for row in rows]
    within = torch.stack([places.T @ places / len(places) for places in centred]).mean(dim=0)
    optimizer = torch.optim.LBFGS(
        [shift.requires_grad_(), matrix.requires_grad_()],
        max_iter=EVALUATIONS,
        max_eval=EVALUATIONS,
        tolerance_grad=1e-5,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = list[torch.Tensor]()
        for row in rows:
            scores = row.scores + row.places @ shift + row.asked / scale @ (row.places @ matrix).T
            losses.append(-(row.shares * torch.log_softmax(scores, dim=1)).sum(dim=1).mean())
        loss = torch.stack(losses).mean() + PULL * shift @ within @ shift + SHRINK * matrix.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return shift.detach(), matrix.detach()
