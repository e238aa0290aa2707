"""What one sample adds to the statistics: attention, the loss of the answer with fewer visual tokens, and FitPrune's counts.

FitPrune: Ye et al., "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models", AAAI
2025, arXiv 2409.10197. For a tolerance alpha, every layer sorts the surviving tokens by the attention that they get from text
(cross) and from visual tokens (self). For each order it finds the longest run of the least attended tokens whose loss leaves (1 -
alpha) of the unpruned sum, and deletes the tokens that are in both runs. The paper finds the tolerance by bisection against a
budget. Here all tolerances are counted in one pass, so that the counts of samples add up.
"""

from __future__ import annotations

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


class SampleMeter:
    """Measures episodes of one model and geometry."""

    def __init__(self, loaded: LoadedModel, base: KeepPlan, source: StatisticsSource, recorder: Recorder) -> None:
        self._source, self._recorder = source, recorder
        parts = loaded.family.decoder()
        # Which tokens go does not matter where none stay.
        plans = [base.with_cuts(Cut("layer", "random", 0, layer)) for layer in range(1, base.layers)]
        self._withdrawing = [PrunedDecoder(parts, plan).eval() for plan in plans]

    def measure(self, recording: Recording) -> dict[str, np.ndarray]:
        """Return the sample's value of every sum of its Statistics."""
        values = {name: np.zeros(shape) for name, shape in self._source.shapes().items()}
        logits, kept = self._prefill(recording, values)
        self._withdraw(recording, logits, values)
        if recording.steps:
            self._answer(recording, kept, values)
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
    def _withdraw(self, recording: Recording, logits: torch.Tensor, values: dict[str, np.ndarray]) -> None:
        prefix, visual, suffix = self._recorder.segments(recording)
        nothing = Segment(visual.embeds[:, :0], visual.positions[:, :0])
        for layer, decoder in enumerate((self._recorder.decoder, *self._withdrawing)):
            output = decoder(prefix, visual if layer else nothing, suffix, decoder.empty_caches())
            values["withdrawn_kl"][layer] = float(divergence(logits, output.logits[0]).mean())

    def _answer(self, recording: Recording, kept: tuple[torch.Tensor, ...], values: dict[str, np.ndarray]) -> None:
        def probe(layer: int, view: LayerView) -> None:
            received = _received(view)
            values["coverage"][layer] = np.stack(
                [received[:, : keep_count_up(received.shape[1], share)].sum(axis=1) for share in SHARES], axis=1
            )
            np.put_along_axis(values["habit"][layer], kept[layer].cpu().numpy(), received, axis=1)

        whole = self._recorder.replay(recording, text_groups=recording.groups, probe=probe)
        assert whole.split is not None
        for step, split in enumerate(whole.split.cpu().numpy()):
            values["split"][min(step, STEPS - 1)] += split
            values["steps"][min(step, STEPS - 1)] += 1.0
        for layer in range(self._source.layers):
            for index, share in enumerate(SHARES):
                output = self._recorder.replay(recording, limit_visual(recording.caches, [layer], share))
                values["cache_kl"][layer, index] = float(divergence(whole.logits[0], output.logits[0]).sum())
                changed = whole.logits[0].argmax(dim=-1) != output.logits[0].argmax(dim=-1)
                values["cache_flips"][layer, index] = float(changed.double().sum())


def _received(view: LayerView) -> np.ndarray:
    # The share [kv heads, K] of the answer's attention to vision that each visual token receives, in rank order.
    columns = view.past_attention().double().mean(dim=1)  # [heads, K]
    grouped = columns.view(view.kv_heads, -1, columns.shape[1]).mean(dim=1)
    received: np.ndarray = (grouped / grouped.sum(dim=1, keepdim=True).clamp_min(1e-12)).cpu().numpy()
    return received
