"""Train DyRate's predictor with the model frozen, and derive a fixed schedule from it (arXiv 2501.14204; reconstruction).

At every decode step, a linear classifier over attention shares picks the share of the visual cache that the step may read. The
choice is sampled with straight-through Gumbel noise. The loss is the KL divergence from the unpruned model's next-token
distributions, which needs no labels, plus a penalty for missing the budget. A warm start first fits the classifier as if steps
were independent: it minimizes the expected divergence of its choices, measured once for every share at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgeprune.calibration.allocate.decode_rate import (
    SHARES,
    PolicyReplay,
    RecordedAnswer,
    constant_costs,
    fit_budget,
    map_form,
    mean_share,
    schedule_form,
)
from edgeprune.calibration.collect.run import CollectOptions, source_of
from edgeprune.calibration.data.samples import Sample
from edgeprune.calibration.replay.episodes import Recorder, divergence
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import UsageError
from edgeprune.io.progress import Progress
from edgeprune.methods.dyrate import Predictor
from edgeprune.plan import Cut, KeepPlan, check_keep_ratio
from edgeprune.plan.presets import ranked_plan

EPOCHS = 2
WARM_STEPS = 400
LEARNING_RATE = 0.03, 0.005  # of the warm start and of training
TEMPERATURE = (2.0, 0.5)  # of the Gumbel noise, first and last
BUDGET_PENALTY = 20.0  # nats per squared deviation of the mean share from the budget
FORMS = ("predictor", "schedule", "map")
MIN_STEPS = 4  # decode steps; shorter answers are skipped


@dataclass(frozen=True)
class DecodeRateOptions:
    """Options of a DyRate cut.

    `share`: mean share of the visual cache that decode steps read. `form`: one of FORMS. `layer`: the first layer whose cache is
    limited. `monotone`: the share never grows within an answer. Raises UsageError for an unknown form.
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
    progress: Progress,
    base: KeepPlan,
    rate: DecodeRateOptions,
    priors: Sequence[list[list[int]]] | None = None,
) -> KeepPlan:
    """Return `base` with a DyRate cut, fitted to the model's answers to the samples.

    If `base` has no cache cuts, all its caches are ranked without dropping tokens, by the ranking of `request` and optional
    `priors`. Raises UsageError if all answers are too short to learn from.
    """
    if not base.cache_cuts:
        base = ranked_plan(base, None, priors, request.weights, **source_of(loaded, request).ranking)
    replay = PolicyReplay(Recorder(loaded, base, request.max_tokens, request.device), rate.layer, monotone=rate.monotone)
    answers = replay.record(samples, request.fit, MIN_STEPS, progress.count("answering without pruning, samples", len(samples)))
    options = dyrate_options(replay, answers, rate.share, rate.form, rate.seed, progress)
    return base.with_cuts(Cut("decode", "dyrate", 0, rate.layer, options=options))


def dyrate_options(
    replay: PolicyReplay, answers: Sequence[RecordedAnswer], budget: float, form: str, seed: int, progress: Progress
) -> dict[str, Any]:
    """Return the options of a decode cut in one of FORMS whose steps read a mean share `budget` of the visual cache."""
    if form == "map":
        return {**map_form(replay, answers, budget, progress), "monotone": replay.monotone}
    predictor = train(replay, answers, budget, seed, progress)
    progress.say("meeting the budget")
    predictor = _fit_bias(replay, answers, predictor, budget)
    if form == "predictor":
        return {**predictor.settings(), "monotone": replay.monotone}
    shares = [replay.settle_policy(answer, rate_of(predictor))[0] for answer in answers]
    return {**schedule_form(replay, shares, budget), "monotone": replay.monotone}


def train(replay: PolicyReplay, answers: Sequence[RecordedAnswer], budget: float, seed: int, progress: Progress) -> Predictor:
    """Return a predictor trained on the answers; `seed` determines their order and the Gumbel noise."""
    generator = torch.Generator().manual_seed(seed)
    layers, shares = answers[0].first_attention_shares.shape[0], torch.tensor(SHARES)
    predictor = Predictor(torch.zeros(len(SHARES), layers * 4 + 1), torch.zeros(len(SHARES)), shares)
    predictor.to(answers[0].logits.device)
    _warm_start(replay, answers, predictor, budget, progress)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=LEARNING_RATE[1])
    steps = EPOCHS * len(answers)
    trained = progress.count("training, steps", steps)
    for epoch in range(EPOCHS):
        for position, index in enumerate(torch.randperm(len(answers), generator=generator).tolist()):
            done = epoch * len(answers) + position
            start, end = TEMPERATURE
            loss = _loss(replay, answers[index], predictor, budget, start * (end / start) ** (done / steps), generator)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            trained(done + 1)
    return predictor


def _loss(
    replay: PolicyReplay,
    answer: RecordedAnswer,
    predictor: Predictor,
    budget: float,
    temperature: float,
    generator: torch.Generator,
) -> torch.Tensor:
    with torch.no_grad():  # the predictor's inputs depend on its earlier choices
        shares, _ = replay.settle_policy(answer, rate_of(predictor))
        _, attention_shares = replay.replay_ratios(answer, shares.tolist())
    logits = predictor.logits(attention_shares, _steps(attention_shares))
    noise = -torch.log(-torch.log(torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6)))
    soft = torch.softmax((logits + noise.to(logits.device)) / temperature, dim=-1)
    hard = torch.nn.functional.one_hot(soft.argmax(dim=-1), len(SHARES)).float()
    picked = hard + soft - soft.detach()  # straight-through: one-hot in the forward pass, softmax in the backward pass
    pruned, _ = replay.replay_weights(answer, picked, SHARES)
    kept = picked @ predictor.shares
    kept = torch.cummin(kept, dim=0).values if replay.monotone else kept
    deviation = kept.mean() - budget
    return divergence(answer.logits, pruned).mean().float() + BUDGET_PENALTY * deviation.square()


def _warm_start(
    replay: PolicyReplay, answers: Sequence[RecordedAnswer], predictor: Predictor, budget: float, progress: Progress
) -> None:
    measured = [torch.from_numpy(each).float() for each in constant_costs(replay, answers, progress)]
    costs = torch.cat(measured, dim=1).T.to(answers[0].logits.device)  # [steps, bins]
    attention_shares = [replay.replay_ratios(answer, [budget] * answer.episode.steps)[1].detach() for answer in answers]
    rows, steps = torch.cat(attention_shares), torch.cat([_steps(part) for part in attention_shares])
    optimizer = torch.optim.Adam(predictor.parameters(), lr=LEARNING_RATE[0])
    for _ in range(WARM_STEPS):
        probabilities = torch.softmax(predictor.logits(rows, steps), dim=-1)
        deviation = (probabilities @ predictor.shares).mean() - budget
        loss = (probabilities * costs).sum(dim=-1).mean() + BUDGET_PENALTY * deviation.square()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def rate_of(predictor: Predictor) -> Callable[[torch.Tensor], Sequence[float]]:
    """Return the policy that picks the most likely share at every step."""

    def rate(attention_shares: torch.Tensor) -> list[float]:
        best = predictor.logits(attention_shares, _steps(attention_shares)).argmax(dim=-1)
        return [float(share) for share in predictor.shares[best]]

    return rate


def _fit_bias(replay: PolicyReplay, answers: Sequence[RecordedAnswer], predictor: Predictor, budget: float) -> Predictor:
    # The penalty only steers towards the budget. A bias that favours large or small shares corrects the rest.
    def shifted(offset: float) -> Predictor:
        bias = predictor.bias.detach() + offset * predictor.shares
        return Predictor(predictor.weight.detach(), bias, predictor.shares)

    def spend(offset: float) -> float:
        return mean_share([replay.settle_policy(answer, rate_of(shifted(offset)))[0] for answer in answers])

    return shifted(fit_budget(spend, budget, -60.0, 60.0))


def _steps(attention_shares: torch.Tensor) -> torch.Tensor:
    # The number of each step [T, 1].
    return torch.arange(len(attention_shares), dtype=torch.float32, device=attention_shares.device)[:, None]
