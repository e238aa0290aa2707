"""Train DyRate's predictor with the model frozen, and freeze its rates into a schedule (arXiv 2501.14204; reconstruction).

At every decode step a linear classifier over attention shares picks how much of the visual cache the step may read. The choice
is drawn with straight-through Gumbel noise; the loss is the KL divergence from the unpruned model's next-token distributions,
which needs no labels, plus a charge for missing the budget. Before that it starts from the classifier that is best if every step
stood alone: the expected divergence of its choices, measured once for every share at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgeprune.calibration.allocate.decode_rate import (
    SHARES,
    PolicyReplay,
    RecordedAnswer,
    fit_budget,
    map_form,
    mean_share,
    schedule_form,
)
from edgeprune.calibration.collect.run import CollectOptions, ProgressReporter, source_of
from edgeprune.calibration.data.samples import Sample
from edgeprune.calibration.replay.episodes import Recorder, divergence
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import UsageError
from edgeprune.methods.dyrate import Predictor
from edgeprune.plan import Cut, KeepPlan, check_keep_ratio
from edgeprune.plan.presets import ranked_plan

EPOCHS = 2
WARM_STEPS = 400
LEARNING_RATE = 0.03, 0.005  # of the start and of the training
TEMPERATURE = (2.0, 0.5)  # of the Gumbel noise, first and last
CHARGE = 20.0  # nats for missing the budget by the whole cache, squared
FORMS = ("predictor", "schedule", "map")
LONG_ENOUGH = 4  # decode steps; shorter answers have nothing to learn from
Progress = Callable[[int], None]


@dataclass(frozen=True)
class DecodeRateOptions:
    """How a rate is made: the `share` of the visual cache that steps read on average, the form, the first layer whose cache
    shrinks, and whether the share may grow again.
    """

    share: float
    form: str = "predictor"
    layer: int = 0
    monotone: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UsageError(f"Unknown form {self.form!r}.", hint=f"Forms are: {', '.join(FORMS)}.")
        check_keep_ratio(self.share)


def fit_decode_rate(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    request: CollectOptions,
    progress: ProgressReporter,
    base: KeepPlan,
    rate: DecodeRateOptions,
    priors: Sequence[list[list[int]]] | None = None,
) -> KeepPlan:
    """Return `base` with a DyRate cut, fitted to the model's answers to the samples.

    Caches that `base` does not rank yet are ranked, whole, as the request says, with `priors` or none. Raises UsageError where
    answers are too short to learn a rate from.
    """
    if not base.cache_cuts:
        base = ranked_plan(base, None, priors, **source_of(loaded, request).ranking)
    replay = PolicyReplay(Recorder(loaded, base, request.max_tokens, request.device), rate.layer, monotone=rate.monotone)
    answers = replay.record(samples, request.fit, LONG_ENOUGH, progress.count("answers", len(samples)))
    trained = progress.count("training", EPOCHS * len(answers))
    options = dyrate_options(replay, answers, rate.share, rate.form, rate.seed, trained)
    return base.with_cuts(Cut("decode", "dyrate", 0, rate.layer, options=options))


def dyrate_options(
    replay: PolicyReplay, answers: Sequence[RecordedAnswer], budget: float, form: str, seed: int, progress: Progress
) -> dict[str, Any]:
    """Return the options of a decode cut of one of FORMS whose steps read `budget` of the visual cache on average."""
    if form == "map":
        return {**map_form(replay, answers, budget), "monotone": replay.monotone}
    predictor = train(replay, answers, budget, seed, progress)
    predictor = _brought_to_budget(replay, answers, predictor, budget)
    if form == "predictor":
        return {**predictor.settings(), "monotone": replay.monotone}
    followed = [replay.settle_policy(answer, rate_of(predictor))[0] for answer in answers]
    return {**schedule_form(replay, followed, budget), "monotone": replay.monotone}


def train(replay: PolicyReplay, answers: Sequence[RecordedAnswer], budget: float, seed: int, progress: Progress) -> Predictor:
    """Return a predictor trained on the answers, in an order and with noise drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    layers, shares = answers[0].first_attention_shares.shape[0], torch.tensor(SHARES)
    predictor = Predictor(torch.zeros(len(SHARES), layers * 4 + 1), torch.zeros(len(SHARES)), shares)
    _warm_start(replay, answers, predictor, budget)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=LEARNING_RATE[1])
    steps = EPOCHS * len(answers)
    for epoch in range(EPOCHS):
        for position, index in enumerate(torch.randperm(len(answers), generator=generator).tolist()):
            done = epoch * len(answers) + position
            start, end = TEMPERATURE
            loss = _loss(replay, answers[index], predictor, budget, start * (end / start) ** (done / steps), generator)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            progress(done + 1)
    return predictor


def _loss(
    replay: PolicyReplay,
    answer: RecordedAnswer,
    predictor: Predictor,
    budget: float,
    temperature: float,
    generator: torch.Generator,
) -> torch.Tensor:
    with torch.no_grad():  # what the predictor will see depends on what it drops now
        shares, _ = replay.settle_policy(answer, rate_of(predictor))
        _, seen = replay.replay_ratios(answer, shares.tolist())
    logits = predictor.logits(seen, _steps(len(seen)))
    noise = -torch.log(-torch.log(torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6)))
    soft = torch.softmax((logits + noise) / temperature, dim=-1)
    hard = torch.nn.functional.one_hot(soft.argmax(dim=-1), len(SHARES)).float()
    picked = hard + soft - soft.detach()  # forward the choice, backward the softmax
    pruned, _ = replay.replay_weights(answer, picked, SHARES)
    kept = picked @ predictor.shares
    kept = torch.cummin(kept, dim=0).values if replay.monotone else kept
    missed = kept.mean() - budget
    return divergence(answer.logits, pruned).mean().float() + CHARGE * missed.square()


def _warm_start(replay: PolicyReplay, answers: Sequence[RecordedAnswer], predictor: Predictor, budget: float) -> None:
    costs = torch.cat([torch.from_numpy(replay.constant_costs(answer)).float() for answer in answers], dim=1).T  # [steps, bins]
    seen = [replay.replay_ratios(answer, [budget] * answer.episode.steps)[1].detach() for answer in answers]
    rows, steps = torch.cat(seen), torch.cat([_steps(len(part)) for part in seen])
    optimizer = torch.optim.Adam(predictor.parameters(), lr=LEARNING_RATE[0])
    for _ in range(WARM_STEPS):
        chances = torch.softmax(predictor.logits(rows, steps), dim=-1)
        missed = (chances @ predictor.shares).mean() - budget
        loss = (chances * costs).sum(dim=-1).mean() + CHARGE * missed.square()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def rate_of(predictor: Predictor) -> Callable[[torch.Tensor], Sequence[float]]:
    """Return the rate that picks the likeliest bin at every step."""

    def rate(seen: torch.Tensor) -> list[float]:
        best = predictor.logits(seen, _steps(len(seen))).argmax(dim=-1)
        return [float(share) for share in predictor.shares[best]]

    return rate


def _brought_to_budget(replay: PolicyReplay, answers: Sequence[RecordedAnswer], predictor: Predictor, budget: float) -> Predictor:
    # The charge only steers: a bias that favours large shares, or small ones, meets the budget.
    def shifted(favour: float) -> Predictor:
        bias = predictor.bias.detach() + favour * predictor.shares
        return Predictor(predictor.weight.detach(), bias, predictor.shares)

    def spend(favour: float) -> float:
        return mean_share([replay.settle_policy(answer, rate_of(shifted(favour)))[0] for answer in answers])

    return shifted(fit_budget(spend, budget, -60.0, 60.0))


def _steps(count: int) -> torch.Tensor:
    return torch.from_numpy(np.arange(count, dtype=np.float32))[:, None]
