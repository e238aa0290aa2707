"""FitPrune's recipe: how many tokens each layer may delete while the attention that remains stays near the unpruned.

Ye et al., "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models", AAAI 2025, arXiv
2409.10197. For a tolerance alpha every layer sorts the living tokens by the attention they get from text (cross) and from visual
tokens (self), finds for each the longest run of the least attended whose loss leaves (1 - alpha) of the unpruned sum, and
deletes what is in both runs. The tolerance is found by bisection against a budget; here all tolerances are counted at once, so
that samples add up.
"""

from __future__ import annotations

import numpy as np

from edgeprune.calibration.statistics import ALPHAS


def deletion_counts(cross: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Return the tokens that enter each layer [ALPHAS, layers], of one sample's attention cross and within [layers, V]."""
    layers, tokens = cross.shape
    counts = np.zeros((ALPHAS, layers))
    for index in range(ALPHAS):
        alpha = index / (ALPHAS - 1)
        alive = np.arange(tokens)
        for layer in range(layers):
            counts[index, layer] = len(alive)
            dropped = np.ones(len(alive), bool)
            for mass in (cross[layer], within[layer]):
                dropped &= _droppable(mass[alive], (1 - alpha) * mass.sum())
            alive = alive[~dropped]
    return counts


def _droppable(mass: np.ndarray, floor: float) -> np.ndarray:
    # The least attended tokens, as many as may go while the rest still sums to the floor.
    order = np.argsort(mass, kind="stable")
    left = mass.sum() - np.cumsum(mass[order])
    dropped = np.zeros(len(mass), bool)
    dropped[order[left >= floor]] = True
    return dropped
