"""DyRate policies on recorded answers: the cost of a policy, and forms of it that need no training (arXiv 2501.14204).

A policy gives, for each decode step of an episode, the share of the visual cache that the step may read. In the paper, shares
never grow within an answer. The runtime keeps the whole cache, so they may also grow again. All forms are fitted to the same
budget, the mean share over all steps, so that they can be compared.
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
from edgeprune.io.progress import Count, Progress
from edgeprune.plan import keep_count_up

SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.0)  # choices of the predictor, in descending order (reconstruction)
_INTERVALS = 8  # attention intervals of the map form


@dataclass(frozen=True)
class RecordedAnswer:
    """A recorded answer: the unpruned `logits` [T, vocabulary] and the attention shares [layers, 4] before its first step."""

    episode: Recording
    logits: torch.Tensor
    first_attention_shares: torch.Tensor


class PolicyReplay:
    """Replays recorded answers under a policy.

    The policy acts on the caches of `layer` and all later layers. `monotone`: shares never grow within an answer.
    """

    def __init__(self, recorder: Recorder, layer: int, *, monotone: bool = True) -> None:
        self._recorder, self.layer, self.monotone = recorder, layer, monotone

    def monotone_ratios(self, shares: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the effective shares [T] of the steps for requested `shares` [T]."""
        requested = np.asarray(shares)
        return np.minimum.accumulate(requested) if self.monotone else requested

    def record(self, samples: Sequence[Sample], fit: str, shortest: int, progress: Count) -> list[RecordedAnswer]:
        """Answer the samples and return the answers with at least `shortest` decode steps; raise UsageError if there are none."""
        answers = []
        for done, sample in enumerate(samples, start=1):
            recordings = [each for each in self._recorder.record(sample, fit) if each.steps >= shortest]
            for recording in recordings:
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
        """Return logits [T, vocabulary] and the attention shares before each step [T, layers, 4], the predictor's input.

        `picked` [T, n]: the weight of each of the n `shares` at each step; one-hot unless gradients are needed.
        """
        counts = [cache.visual_key.shape[0] - 1 for cache in answer.episode.caches]
        biases = {count: self._mask_bias(picked, shares, count) for count in set(counts)}
        hide = [biases[count] * float(layer >= self.layer) for layer, count in enumerate(counts)]
        output = self._recorder.run(answer.episode, hide=hide, text_groups=answer.episode.groups)
        assert output.split is not None
        return output.logits[0], torch.cat([answer.first_attention_shares[None], output.split[:-1]])

    def replay_ratios(self, answer: RecordedAnswer, shares: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Like `replay_weights`, with one share per step."""
        return self.replay_weights(answer, torch.eye(len(shares), device=answer.logits.device), shares)

    def _mask_bias(self, picked: torch.Tensor, shares: Sequence[float], count: int) -> torch.Tensor:
        rank = torch.arange(count, device=picked.device)
        kept = picked @ torch.stack([(rank < keep_count_up(count, share)).float() for share in shares])
        if self.monotone:  # a dropped token stays dropped for the rest of the answer
            kept = torch.cumprod(kept, dim=0)
        return (kept - 1.0) * 30.0  # linear, so that the gradient of a kept token reflects the cost of dropping it

    @torch.no_grad()
    def settle_policy(self, answer: RecordedAnswer, rate: Callable[[torch.Tensor], Sequence[float]]) -> tuple[np.ndarray, float]:
        """Return the shares [T] of a policy and the KL divergence in nats summed over the answer.

        `rate` maps attention shares [T, layers, 4] to cache shares. Its input depends on what it dropped, so the replay is iterated
        three times.
        """
        shares = np.ones(answer.episode.steps)
        for _ in range(3):
            _, attention_shares = self.replay_ratios(answer, shares.tolist())
            shares = self.monotone_ratios(rate(attention_shares))
        logits, _ = self.replay_ratios(answer, shares.tolist())
        return shares, float(divergence(answer.logits, logits).sum())

    @torch.no_grad()
    def constant_costs(self, answer: RecordedAnswer) -> np.ndarray:
        """Return the KL divergence in nats [len(SHARES), T] at each step when every step reads the same share."""
        costs = []
        for share in SHARES:
            logits, _ = self.replay_ratios(answer, [share] * answer.episode.steps)
            costs.append(divergence(answer.logits, logits).cpu().numpy())
        return np.stack(costs)


def mean_share(shares: Sequence[np.ndarray]) -> float:
    """Return the mean share over all steps of all answers."""
    return float(np.concatenate(shares).mean())


def fit_budget(spend: Callable[[float], float], budget: float, low: float, high: float) -> float:
    """Bisect for the largest argument in [low, high] at which the increasing function `spend` does not exceed the budget."""
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if spend(middle) <= budget else (low, middle)
    return low


def schedule_form(replay: PolicyReplay, shares: Sequence[np.ndarray], budget: float) -> dict[str, Any]:
    """Return the options of a fixed schedule: the mean share of a policy at every step, scaled to the budget."""
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


def constant_costs(replay: PolicyReplay, answers: Sequence[RecordedAnswer], progress: Progress) -> list[np.ndarray]:
    """Return `PolicyReplay.constant_costs` of each answer."""
    measured, costs = progress.count("costs of shares, answers", len(answers)), list[np.ndarray]()
    for answer in answers:
        costs.append(replay.constant_costs(answer))
        measured(len(costs))
    return costs


def map_form(replay: PolicyReplay, answers: Sequence[RecordedAnswer], budget: float, progress: Progress) -> dict[str, Any]:
    """Return the options of the training-free map from intervals of attention to the image to cache shares.

    A step needs the smallest share from which on its divergence stays below a limit. The limit is chosen to meet the budget.
    """
    costs = constant_costs(replay, answers, progress)
    progress.say("meeting the budget")
    unpruned = [replay.replay_ratios(answer, [1.0] * answer.episode.steps)[1] for answer in answers]
    attention = np.concatenate([rows[:, :, 1].mean(dim=1).detach().cpu().numpy() for rows in unpruned])
    edges = np.quantile(attention, np.arange(1, _INTERVALS) / _INTERVALS)
    interval = np.searchsorted(edges, attention, side="right")

    def shares_at(limit: float) -> np.ndarray:
        needed = np.concatenate([_needed(cost, limit) for cost in costs])
        means = [needed[interval == index].mean() if (interval == index).any() else 0.0 for index in range(_INTERVALS)]
        return np.round(_isotonic(np.asarray(means)), 3)

    def spend(exponent: float) -> float:
        shares = shares_at(10.0**-exponent)
        return mean_share([replay.settle_policy(answer, lambda rows: _map_shares(rows, edges, shares))[0] for answer in answers])

    exponent = fit_budget(spend, budget, -2.0, 6.0)
    return {"form": "map", "attention": np.round(edges, 5).tolist(), "shares": shares_at(10.0**-exponent).tolist()}


def _map_shares(attention_shares: torch.Tensor, edges: np.ndarray, shares: np.ndarray) -> list[float]:
    attention = attention_shares[:, :, 1].mean(dim=1).cpu().numpy()
    return [float(share) for share in shares[np.searchsorted(edges, attention, side="right")]]


def _needed(costs: np.ndarray, limit: float) -> np.ndarray:
    # SHARES descend: count the leading shares whose cost stays within the limit.
    within = np.logical_and.accumulate(costs <= limit, axis=0).sum(axis=0)
    needed: np.ndarray = np.asarray(SHARES)[np.maximum(within - 1, 0)]
    return needed


def _isotonic(values: np.ndarray) -> np.ndarray:
    # Pool adjacent violators: the nearest non-decreasing sequence.
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return np.concatenate([np.full(count, mean) for mean, count in blocks])
