"""Derive from statistics how many visual tokens each layer keeps (PLPHP, FitPrune, VTW, least-cost allocation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgeprune.calibration.data.statistics import GAMMA_BINS, SHARES, Statistics
from edgeprune.errors import PlanError, UsageError
from edgeprune.plan import CLASSES, Cut, KeepPlan, Weights
from edgeprune.plan.presets import ranked_plan

ATTENTIVE, BALANCED, INDIFFERENT = "attentive", "balanced", "indifferent"
LIVE = "live"  # classes that every input picks
VTW_ETA, VTW_FIRST = 0.003, 5  # the authors' threshold in nats, and the first layer that they look at
_CENTRES = (np.arange(GAMMA_BINS) + 0.5) / GAMMA_BINS  # of the histogram of scores
_GRID_STEPS = 200  # resolution of the least-cost allocator, per layer


@dataclass(frozen=True)
class LayerClass:
    """PLPHP's classification of one layer.

    `name`: the class. `share`: keep ratio of the layer's cache. `gamma`: mean vision attention score. `stability`: the share of
    samples whose own score gives the same class.
    """

    layer: int
    name: str
    share: float
    gamma: float
    stability: float


@dataclass(frozen=True)
class ClassRule:
    """PLPHP's rule: a layer whose score is at least `alpha` keeps `r` + `delta`, one below `beta` keeps `r` - `delta`, others `r`.

    Raises UsageError if beta is larger than alpha.
    """

    alpha: float
    beta: float
    r: float
    delta: float

    def __post_init__(self) -> None:
        if self.beta > self.alpha:
            raise UsageError(
                f"beta {self.beta:.3g} is above alpha {self.alpha:.3g}.", hint="Give --option beta and alpha together."
            )

    @property
    def shares(self) -> tuple[float, float, float]:
        """The keep ratios of indifferent, balanced and attentive layers."""
        low, middle, high = (min(1.0, max(0.0, self.r + shift)) for shift in (-self.delta, 0.0, self.delta))
        return low, middle, high

    def kinds(self, scores: np.ndarray) -> np.ndarray:
        """Return the index in `shares` of each score."""
        kinds: np.ndarray = np.searchsorted([self.beta, self.alpha], scores, side="right")
        return kinds


def class_rule(statistics: Statistics, share: float | None, settings: Mapping[str, Any]) -> ClassRule:
    """Return the rule that `settings` (options of PLPHP) and the statistics give.

    Without `r`, it is chosen so that the mean over the layers is `share`: over the frozen classes, or over the samples' own
    classes if they are live. Reconstruction: the paper's thresholds were not available, so quartiles of the layers' mean scores
    replace them.
    """
    histogram = statistics.mean("gamma")
    means = histogram @ _CENTRES
    beta, alpha = (float(settings.get(name, np.quantile(means, part))) for name, part in (("beta", 0.25), ("alpha", 0.75)))
    middle = float(settings.get("r", share))
    rule = ClassRule(alpha, beta, middle, float(settings.get("delta", min(middle, 1 - middle) / 2)))

    def mean_share(r: float) -> float:
        shares = np.asarray(replace(rule, r=r).shares)
        live = settings.get("classes") == LIVE
        return float((histogram @ shares[rule.kinds(_CENTRES)]).mean() if live else shares[rule.kinds(means)].mean())

    if "r" in settings or share is None or abs(mean_share(share) - share) < 1e-6:
        return rule
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_share(middle) <= share else (low, middle)
    return replace(rule, r=round(low, 4))


def classify(statistics: Statistics, rule: ClassRule) -> list[LayerClass]:
    """Return PLPHP's class of every layer by its mean score."""
    histogram = statistics.mean("gamma")
    means, per_bin = histogram @ _CENTRES, rule.kinds(_CENTRES)
    names = (INDIFFERENT, BALANCED, ATTENTIVE)
    return [
        LayerClass(layer, names[kind], rule.shares[kind], float(mean), float(histogram[layer, per_bin == kind].sum()))
        for layer, (kind, mean) in enumerate(zip(rule.kinds(means), means, strict=True))
    ]


def plphp_plan(
    statistics: Statistics, base: KeepPlan, shares: Sequence[float], *, prior: bool = False, weights: Weights | None = None
) -> KeepPlan:
    """Return `base` with a PLPHP cut of every layer's cache; `shares` are keep ratios of the tokens that reach each layer.

    `prior`: also rank by the positions that the calibration set's answers attended to. `weights`: of a learned ranking.
    """
    counts = [int(base.tokens_at_layer(layer) * share + 1e-9) for layer, share in enumerate(shares)]
    return ranked_plan(base, counts, statistics.prior() if prior else None, weights, **statistics.source.ranking)


def live_plan(
    statistics: Statistics, base: KeepPlan, rule: ClassRule, *, prior: bool = False, weights: Weights | None = None
) -> KeepPlan:
    """Return `base` with PLPHP cuts whose caches hold what an attentive layer keeps, and a decode cut that reads by class.

    `prior` and `weights` as in `plphp_plan`.
    """
    low, middle, high = rule.shares
    if not high:
        raise PlanError("Attentive layers keep nothing.", hint="Ask for more: --budget or --option r.")
    plan = plphp_plan(statistics, base, [high] * base.layers, prior=prior, weights=weights)
    shares = [round(share / high, 5) for share in (low, middle, high)]
    options = {"form": CLASSES, "thresholds": [round(rule.beta, 5), round(rule.alpha, 5)], "shares": shares}
    return plan.with_cuts(Cut("decode", "plphp", 0, 0, options=options))


def least_cost_shares(statistics: Statistics, share: float) -> list[float]:
    """Return the keep ratio of each layer's visual cache that minimizes the cost, with a mean of at most `share`.

    The cost of a layer is the KL divergence (nats) caused by its cut alone, made monotone and interpolated between the measured
    ratios. The costs of layers are assumed to add up. Solved exactly by dynamic programming over the layers.
    """
    measured = np.concatenate([statistics.mean("cache_kl"), np.zeros((statistics.source.layers, 1))], axis=1)
    monotone = np.maximum.accumulate(measured[:, ::-1], axis=1)[:, ::-1]
    grid = np.linspace(0.0, 1.0, _GRID_STEPS + 1)
    costs = np.stack([np.interp(grid, [*SHARES, 1.0], row) for row in monotone])
    # A tiny convex penalty breaks ties in favour of an even split.
    costs += 1e-6 * (1 - grid) ** 2
    budget = int(share * _GRID_STEPS * len(costs) + 1e-9)
    return [float(grid[units]) for units in _knapsack(costs, budget)]


def _knapsack(costs: np.ndarray, budget: int) -> list[int]:
    # best[b]: the least cost of the layers so far with b units; taken[layer, b]: the choice that reaches it.
    layers, choices = costs.shape
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    taken = np.zeros((layers, budget + 1), np.int64)
    for layer in range(layers):
        options = np.full((choices, budget + 1), np.inf)
        for units in range(min(choices, budget + 1)):
            options[units, units:] = best[: budget + 1 - units] + costs[layer, units]
        taken[layer] = options.argmin(axis=0)
        best = options.min(axis=0)
    remaining, result = int(best.argmin()), []
    for layer in reversed(range(layers)):
        result.append(int(taken[layer, remaining]))
        remaining -= result[-1]
    return result[::-1]


def fitprune_plan(statistics: Statistics, base: KeepPlan, share: float, stages: int = 4) -> KeepPlan:
    """Return `base` with FitPrune's recipe at a mean keep ratio of `share` over the layers, with at most `stages` cuts.

    The recipe deletes a few tokens in every layer: the mean over the samples, rounded down as by its authors. Deletions are grouped
    at stage boundaries so that the graph has few cuts. Raises PlanError if no tolerance reaches `share`.
    """
    for entering in statistics.mean("fitprune"):  # from the lowest tolerance to the highest
        deleted = np.floor(entering[:-1] - entering[1:] + 1e-9)
        plan = _group_into_stages(base, entering[0] - np.concatenate([[0.0], deleted.cumsum()]), stages)
        if sum(map(plan.tokens_at_layer, range(base.layers))) <= share * base.geometry.tokens * base.layers:
            return plan
    raise PlanError(f"FitPrune cannot reach {share:.0%}: layer 0 sees every token.", hint="Ask for more, or cut at the input.")


def _group_into_stages(base: KeepPlan, recipe: np.ndarray, stages: int) -> KeepPlan:
    # Stages begin at the layers before which the recipe drops the most tokens. A stage keeps the mean over its layers, so that
    # the total stays near the recipe's.
    dropped = recipe[:-1] - recipe[1:]
    boundaries = sorted(1 + int(index) for index in np.argsort(-dropped, kind="stable")[: min(stages, len(dropped))])
    ends = [*boundaries[1:], base.layers]
    kept = [max(1, int(recipe[a:b].mean())) for a, b in zip(boundaries, ends, strict=True)]
    return base.with_cuts(*(Cut("layer", "fitprune", keep, layer) for keep, layer in zip(kept, boundaries, strict=True)))


def vtw_plan(
    statistics: Statistics | None, base: KeepPlan, share: float | None = None, *, eta: float = VTW_ETA, first: int = VTW_FIRST
) -> KeepPlan:
    """Return `base` with all visual tokens withdrawn before one layer.

    The layer is at `share` of the depth or, without `share`, the authors': of `first` and the layers after it, the first before
    which a withdrawal costs at most `eta` nats, which takes statistics. Raises PlanError if there is no such layer.
    """
    if share is not None:
        layer = max(1, round(share * base.layers))
    else:
        assert statistics is not None
        costs = statistics.mean("withdrawn_kl")
        found = [layer for layer in range(first, base.layers) if costs[layer] <= eta]
        if not found:
            raise PlanError(
                f"Withdrawing visual tokens costs more than {eta:g} nats before every layer from {first} on.",
                hint="Ask for a budget (--budget 0.5), or allow more (--option eta=0.01).",
            )
        layer = found[0]
    return base.with_cuts(Cut("layer", "vtw", 0, layer)) if layer < base.layers else base
