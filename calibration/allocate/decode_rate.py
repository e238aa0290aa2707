"""DyRate's rates at work on recorded answers: what a rate costs, and forms of it that need no training.

A policy says, for each decode step of an episode, the share of the visual cache that the step may read. In the paper's way
shares never grow within an answer; since the runtime keeps the whole cache, they may also follow the need up and down. Every
form is brought to the same budget, the mean share over all steps, so that they can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgeprune.calibration.data.samples import Sample
from edgeprune.calibration.replay.episodes import Recorder, Recording, divergence
from edgeprune.errors import UsageError
from edgeprune.plan import keep_count_up

SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.0)  # what a live rate picks from (reconstruction)
_INTERVALS = 8  # of the attention map


@dataclass(frozen=True)
class RecordedAnswer:
    """A recorded answer: the unpruned `logits` [T, vocabulary], and the split [layers, 4] before its first step."""

    episode: Recording
    logits: torch.Tensor
    first_attention_shares: torch.Tensor


class PolicyReplay:
    """Plays recorded answers again under a policy. The rate acts on the caches of `layer` and all later ones; `monotone`: it never
    grows.
    """

    def __init__(self, recorder: Recorder, layer: int, *, monotone: bool = True) -> None:
        self._recorder, self.layer, self.monotone = recorder, layer, monotone

    def monotone_ratios(self, shares: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the shares [T] that steps read whose rate asked for these."""
        asked = np.asarray(shares)
        return np.minimum.accumulate(asked) if self.monotone else asked

    def record(self, samples: Sequence[Sample], fit: str, shortest: int, progress: Callable[[int], None]) -> list[RecordedAnswer]:
        """Answer the samples and return those answers that take at least `shortest` steps; raise UsageError when there is none."""
        answers = []
        for done, sample in enumerate(samples, start=1):
            recording = self._recorder.record(sample, fit)
            if recording.steps >= shortest:
                logits = self._recorder.replay(recording).logits[0]
                answers.append(RecordedAnswer(recording, logits, self._recorder.first_attention_shares(recording)))
            progress(done)
        if not answers:
            raise UsageError(
                f"No answer takes {shortest} steps, so there is no rate to learn.", hint="Add prompts with long answers."
            )
        return answers

    def replay_weights(
        self, answer: RecordedAnswer, picked: torch.Tensor, shares: Sequence[float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [T, vocabulary] and what a predictor sees before each step [T, layers, 4].

        `picked` [T, n]: how much each step goes for each of n `shares`; a 1 and zeros, unless a gradient is wanted.
        """
        counts = [cache.visual_key.shape[0] - 1 for cache in answer.episode.caches]
        hidden = {count: self._hidden(picked, shares, count) for count in set(counts)}
        hide = [hidden[count] * float(layer >= self.layer) for layer, count in enumerate(counts)]
        output = self._recorder.run(answer.episode, hide=hide, text_groups=answer.episode.groups)
        assert output.split is not None
        return output.logits[0], torch.cat([answer.first_attention_shares[None], output.split[:-1]])

    def replay_ratios(self, answer: RecordedAnswer, shares: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Do as `replay_weights`, with one share for each step."""
        return self.replay_weights(answer, torch.eye(len(shares), device=answer.logits.device), shares)

    def _hidden(self, picked: torch.Tensor, shares: Sequence[float], count: int) -> torch.Tensor:
        rank = torch.arange(count, device=picked.device)
        kept = picked @ torch.stack([(rank < keep_count_up(count, share)).float() for share in shares])
        if self.monotone:  # dropped once is dropped for the rest of the answer
            kept = torch.cumprod(kept, dim=0)
        return (kept - 1.0) * 30.0  # linear, so that a gradient can ask what dropping a kept token would cost

    @torch.no_grad()
    def settle_policy(self, answer: RecordedAnswer, rate: Callable[[torch.Tensor], Sequence[float]]) -> tuple[np.ndarray, float]:
        """Return the shares [T] that a rate ends up with, and the KL divergence in nats summed over the answer.

        `rate` maps what it sees [T, layers, 4] to shares. What it sees depends on what it dropped: three rounds settle that.
        """
        shares = np.ones(answer.episode.steps)
        for _ in range(3):
            _, seen = self.replay_ratios(answer, shares.tolist())
            shares = self.monotone_ratios(rate(seen))
        logits, _ = self.replay_ratios(answer, shares.tolist())
        return shares, float(divergence(answer.logits, logits).sum())

    @torch.no_grad()
    def constant_costs(self, answer: RecordedAnswer) -> np.ndarray:
        """Return the KL divergence [len(SHARES), T] at each step when every step reads the same share."""
        costs = []
        for share in SHARES:
            logits, _ = self.replay_ratios(answer, [share] * answer.episode.steps)
            costs.append(divergence(answer.logits, logits).cpu().numpy())
        return np.stack(costs)


def mean_share(shares: Sequence[np.ndarray]) -> float:
    """Return the mean over all steps of all answers."""
    return float(np.concatenate(shares).mean())


def fit_budget(spend: Callable[[float], float], budget: float, low: float, high: float) -> float:
    """Return the argument in [low, high] at which a growing `spend` comes nearest to the budget without passing it."""
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if spend(middle) <= budget else (low, middle)
    return low


def schedule_form(replay: PolicyReplay, shares: Sequence[np.ndarray], budget: float) -> dict[str, Any]:
    """Return the options of a fixed schedule: the mean share of a policy at every step, brought to the budget."""
    longest = max(len(row) for row in shares)
    by_step = [np.mean([row[step] for row in shares if len(row) > step]) for step in range(longest)]
    curve = replay.monotone_ratios(by_step)
    lengths = [len(row) for row in shares]

    def scaled(factor: float) -> np.ndarray:
        return np.round(np.clip(curve * factor, 0.0, 1.0), 2)

    factor = fit_budget(lambda f: mean_share([scaled(f)[:length] for length in lengths]), budget, 0.0, 1.0 / max(curve.min(), 1e-3))
    final = scaled(factor)
    starts = [0, *(np.flatnonzero(np.diff(final)) + 1).tolist()]
    return {"form": "schedule", "steps": starts, "shares": [float(final[step]) for step in starts]}


def map_form(replay: PolicyReplay, answers: Sequence[RecordedAnswer], budget: float) -> dict[str, Any]:
    """Return the options of the training-free map: the image's share of attention in intervals, each with the share it needs.

    A step needs the smallest share from which on its divergence stays under a limit; the limit is what meets the budget.
    """
    costs = [replay.constant_costs(answer) for answer in answers]
    seen = [replay.replay_ratios(answer, [1.0] * answer.episode.steps)[1] for answer in answers]
    attention = np.concatenate([rows[:, :, 1].mean(dim=1).detach().cpu().numpy() for rows in seen])
    edges = np.quantile(attention, np.arange(1, _INTERVALS) / _INTERVALS)
    interval = np.searchsorted(edges, attention, side="right")

    def shares_at(limit: float) -> np.ndarray:
        needed = np.concatenate([_needed(cost, limit) for cost in costs])
        means = [needed[interval == index].mean() if (interval == index).any() else 0.0 for index in range(_INTERVALS)]
        return np.round(_isotonic(np.asarray(means)), 3)

    def spend(exponent: float) -> float:
        shares = shares_at(10.0**-exponent)
        return mean_share([replay.settle_policy(answer, lambda rows: _mapped(rows, edges, shares))[0] for answer in answers])

    exponent = fit_budget(spend, budget, -2.0, 6.0)
    return {"form": "map", "attention": np.round(edges, 5).tolist(), "shares": shares_at(10.0**-exponent).tolist()}


def _mapped(seen: torch.Tensor, edges: np.ndarray, shares: np.ndarray) -> list[float]:
    attention = seen[:, :, 1].mean(dim=1).cpu().numpy()
    return [float(share) for share in shares[np.searchsorted(edges, attention, side="right")]]


def _needed(costs: np.ndarray, limit: float) -> np.ndarray:
    # SHARES fall, so a step may go on as long as every larger share was fine as well.
    fine = np.logical_and.accumulate(costs <= limit, axis=0).sum(axis=0)
    needed: np.ndarray = np.asarray(SHARES)[np.maximum(fine - 1, 0)]
    return needed


def _isotonic(values: np.ndarray) -> np.ndarray:
    # Pool adjacent violators: the nearest sequence that never falls.
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return np.concatenate([np.full(count, mean) for mean, count in blocks])
