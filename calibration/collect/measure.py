"""The contribution of one sample to the statistics: attention, divergence with fewer visual tokens, and FitPrune's counts.

FitPrune: Ye et al., "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models", AAAI
2025, arXiv 2409.10197. For a tolerance alpha, every layer sorts the remaining tokens by the attention that they receive from text
(cross) and from visual tokens (self). In each order it finds the longest run of least attended tokens whose removal leaves at
least (1 - alpha) of the unpruned sum, and deletes the tokens that are in both runs. The paper finds the tolerance by bisection
against a budget. Here all tolerances are counted in one pass, so that counts can be added over samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from edgeprune.calibration.data.statistics import ALPHAS, GAMMA_BINS, SHARES, STEPS, StatisticsSource
from edgeprune.calibration.replay.episodes import Recorder, Recording, divergence, limit_visual
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.methods.base import LayerView
from edgeprune.methods.fitprune import attention_received
from edgeprune.methods.plphp import vision_attention_score
from edgeprune.model import PrunedDecoder, Segment
from edgeprune.plan import Cut, KeepPlan, keep_count_up


def deletion_counts(cross: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Return FitPrune's number of tokens that enter each layer [ALPHAS, layers], for one sample.

    `cross`, `within` [layers, V]: the attention that visual tokens receive from text and from visual tokens.
    """
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
    # The longest run of least attended tokens without which the sum stays at or above the floor.
    order = np.argsort(mass, kind="stable")
    remaining = mass.sum() - np.cumsum(mass[order])
    dropped = np.zeros(len(mass), bool)
    dropped[order[remaining >= floor]] = True
    return dropped


class SampleMeter:
    """Measures recordings of one model and geometry."""

    def __init__(self, loaded: LoadedModel, base: KeepPlan, source: StatisticsSource, recorder: Recorder) -> None:
        self._source, self._recorder = source, recorder
        parts = loaded.family.decoder()
        # The method is irrelevant, since a withdrawal keeps no tokens.
        plans = [base.with_cuts(Cut("layer", "random", 0, layer)) for layer in range(1, base.layers)]
        self._withdrawing = [PrunedDecoder(parts, plan).eval() for plan in plans]

    def measure(self, recordings: Sequence[Recording]) -> dict[str, np.ndarray]:
        """Return a sample's contribution to every sum of `Statistics`, by name: the mean over the recordings of its images."""
        measured = [self._measure(recording) for recording in recordings]
        return {name: np.mean([values[name] for values in measured], axis=0) for name in measured[0]}

    def _measure(self, recording: Recording) -> dict[str, np.ndarray]:
        values = {name: np.zeros(shape) for name, shape in self._source.shapes().items()}
        logits, kept = self._prefill(recording, values)
        self._measure_withdrawals(recording, logits, values)
        if recording.steps:
            self._measure_answer(recording, kept, values)
        return values

    @torch.no_grad()
    def _prefill(self, recording: Recording, values: dict[str, np.ndarray]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        cross: list[torch.Tensor] = []
        within: list[torch.Tensor] = []

        def probe(layer: int, view: LayerView) -> None:
            gamma = float(vision_attention_score(view.attention()))
            values["gamma"][layer, min(int(gamma * GAMMA_BINS), GAMMA_BINS - 1)] = 1.0
            for rows, received in zip((cross, within), attention_received(view), strict=True):
                rows.append(received)

        decoder = self._recorder.decoder
        output = decoder(*self._recorder.segments(recording), decoder.empty_caches(), probe=probe)
        values["fitprune"] = deletion_counts(torch.stack(cross).cpu().numpy(), torch.stack(within).cpu().numpy())
        return output.logits[0], output.kept

    @torch.no_grad()
    def _measure_withdrawals(self, recording: Recording, logits: torch.Tensor, values: dict[str, np.ndarray]) -> None:
        prefix, visual, suffix = self._recorder.segments(recording)
        no_tokens = Segment(visual.embeds[:, :0], visual.positions[:, :0])
        for layer, decoder in enumerate((self._recorder.decoder, *self._withdrawing)):
            output = decoder(prefix, visual if layer else no_tokens, suffix, decoder.empty_caches())
            values["withdrawn_kl"][layer] = float(divergence(logits, output.logits[0]).mean())

    def _measure_answer(self, recording: Recording, kept: tuple[torch.Tensor, ...], values: dict[str, np.ndarray]) -> None:
        def probe(layer: int, view: LayerView) -> None:
            received = _attention_shares(view)
            values["coverage"][layer] = np.stack(
                [received[:, : keep_count_up(received.shape[1], share)].sum(axis=1) for share in SHARES], axis=1
            )
            np.put_along_axis(values["habit"][layer], kept[layer].cpu().numpy(), received, axis=1)

        unpruned = self._recorder.replay(recording, text_groups=recording.groups, probe=probe)
        assert unpruned.split is not None
        for step, split in enumerate(unpruned.split.cpu().numpy()):
            values["split"][min(step, STEPS - 1)] += split
            values["steps"][min(step, STEPS - 1)] += 1.0
        for layer in range(self._source.layers):
            for index, share in enumerate(SHARES):
                output = self._recorder.replay(recording, limit_visual(recording.caches, [layer], share))
                values["cache_kl"][layer, index] = float(divergence(unpruned.logits[0], output.logits[0]).sum())
                changed = unpruned.logits[0].argmax(dim=-1) != output.logits[0].argmax(dim=-1)
                values["cache_flips"][layer, index] = float(changed.double().sum())


def _attention_shares(view: LayerView) -> np.ndarray:
    # The share [KV heads, K] of the answer's attention to visual tokens that each of them receives, in rank order.
    columns = view.past_attention().double().mean(dim=1)  # [heads, K]
    grouped = columns.view(view.kv_heads, -1, columns.shape[1]).mean(dim=1)
    received: np.ndarray = (grouped / grouped.sum(dim=1, keepdim=True).clamp_min(1e-12)).cpu().numpy()
    return received
