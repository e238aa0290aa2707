"""From statistics to budgets: how many visual tokens each layer keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.calibration.data.statistics import GAMMA_BINS, SHARES, Statistics
from edgeprune.errors import PlanError
from edgeprune.plan import Cut, KeepPlan, keep_count
from edgeprune.plan.presets import ranked_plan

ATTENTIVE, BALANCED, INDIFFERENT = "attentive", "balanced", "indifferent"
VTW_LIMIT = 0.003  # nats; the threshold below which VTW calls a withdrawal harmless
_FINE = 200  # steps into which the allocator divides one layer's cache


@dataclass(frozen=True)
class LayerClass:
    """PLPHP's verdict on one layer: its class, the share kept, the mean score, and the share of samples that would have got this
    class.
    """

    layer: int
    name: str
    share: float
    gamma: float
    stability: float


def classify(statistics: Statistics, share: float, delta: float, quantiles: tuple[float, float] = (0.25, 0.75)) -> list[LayerClass]:
    """Return PLPHP's class of every layer: vision-attentive layers keep share + delta, vision-indifferent ones share - delta.

    Reconstruction: the thresholds are quantiles over the layers of the mean score, since the paper's values were not available.
    """
    histogram = statistics.mean("gamma")
    centres = (np.arange(GAMMA_BINS) + 0.5) / GAMMA_BINS
    means = histogram @ centres
    beta, alpha = (float(np.quantile(means, quantile)) for quantile in quantiles)
    per_bin = np.where(centres >= alpha, 2, np.where(centres < beta, 0, 1))
    names, shifts = (INDIFFERENT, BALANCED, ATTENTIVE), (-delta, 0.0, delta)
    classes = []
    for layer, mean in enumerate(means):
        kind = 2 if mean >= alpha else 0 if mean < beta else 1
        kept = float(np.clip(share + shifts[kind], 0.0, 1.0))
        classes.append(LayerClass(layer, names[kind], kept, float(mean), float(histogram[layer, per_bin == kind].sum())))
    return classes


def plphp_plan(statistics: Statistics, base: KeepPlan, shares: Sequence[float], *, prior: bool = False) -> KeepPlan:
    """Return `base` with a PLPHP cut of every layer's cache that keeps these shares of what is alive there.

    `prior`: rank also by where the calibration set's answers looked.
    """
    counts = [int(base.tokens_at_layer(layer) * share + 1e-9) for layer, share in enumerate(shares)]
    return ranked_plan(base, counts, statistics.prior() if prior else None, **statistics.source.ranking)


def least_cost_shares(statistics: Statistics, share: float) -> list[float]:
    """Return the share of each layer's visual cache that adds up to `share` of all and costs the least.

    The cost of a layer is the KL divergence that its cut alone caused, made monotone and interpolated between the measured
    shares; the costs of several layers are taken to add up. Solved exactly by dynamic programming over the layers.
    """
    measured = np.concatenate([statistics.mean("cache_kl"), np.zeros((statistics.source.layers, 1))], axis=1)
    monotone = np.maximum.accumulate(measured[:, ::-1], axis=1)[:, ::-1]
    grid = np.linspace(0.0, 1.0, _FINE + 1)
    costs = np.stack([np.interp(grid, [*SHARES, 1.0], row) for row in monotone])
    # Among equal costs, the even split: a tiny convex charge for taking much from one layer.
    costs += 1e-6 * (1 - grid) ** 2
    budget = int(share * _FINE * len(costs) + 1e-9)
    return [float(grid[units]) for units in _knapsack(costs, budget)]


def _knapsack(costs: np.ndarray, budget: int) -> list[int]:
    # best[b]: the least cost of the layers so far with b units; the choice of every layer is remembered.
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
    left, result = int(best.argmin()), []
    for layer in reversed(range(layers)):
        result.append(int(taken[layer, left]))
        left -= result[-1]
    return result[::-1]


def fitprune_plan(statistics: Statistics, base: KeepPlan, share: float, stages: int = 4) -> KeepPlan:
    """Return `base` with FitPrune's recipe whose mean share of living tokens over the layers is `share`, in few stages.

    The recipe deletes a few tokens in every layer; deletions are gathered at stage boundaries, so that a graph has few cuts.
    """
    for recipe in statistics.mean("fitprune"):  # from the strictest tolerance to the loosest
        plan = _staged(base, recipe, stages)
        if sum(map(plan.tokens_at_layer, range(base.layers))) <= share * base.geometry.tokens * base.layers:
            return plan
    raise PlanError(f"FitPrune cannot reach {share:.0%}: layer 0 sees every token.", hint="Ask for more, or cut at the input.")


def _staged(base: KeepPlan, recipe: np.ndarray, stages: int) -> KeepPlan:
    # A stage keeps the mean of its layers, so that the total stays near what the recipe says.
    boundaries = _boundaries(recipe, stages)
    ends = [*boundaries[1:], base.layers]
    kept = [max(1, int(recipe[a:b].mean())) for a, b in zip(boundaries, ends, strict=True)]
    return base.with_cuts(*(Cut("layer", "fitprune", keep, layer) for keep, layer in zip(kept, boundaries, strict=True)))


def _boundaries(recipe: np.ndarray, stages: int) -> list[int]:
    # The layers before which the most tokens leave.
    leaving = recipe[:-1] - recipe[1:]
    return sorted(1 + int(index) for index in np.argsort(-leaving, kind="stable")[: min(stages, len(leaving))])


def vtw_plan(statistics: Statistics, base: KeepPlan, share: float | None = None, limit: float = VTW_LIMIT) -> KeepPlan:
    """Return `base` with every visual token withdrawn before one layer: at `share` of the layers, or the first that is harmless."""
    if share is not None:
        layer = max(1, round(share * base.layers))
    else:
        harmless = statistics.mean("withdrawn_kl") < limit
        later = [layer for layer in range(1, base.layers) if harmless[layer:].all()]
        if not later:
            raise PlanError(f"Withdrawing visual tokens costs more than {limit} nats before every layer.", hint="Ask for --keep.")
        layer = later[0]
    return base.with_cuts(Cut("layer", "vtw", 0, layer)) if layer < base.layers else base


def with_counts(base: KeepPlan, share: float) -> int:
    """Return how many of the plan's visual tokens a share keeps."""
    return keep_count(base.geometry.tokens, share)
