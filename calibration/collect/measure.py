"""The contribution of one sample to the statistics: attention, divergence with fewer visual tokens, and FitPrune's counts.

FitPrune: Ye et al., "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models", AAAI
2025, arXiv 2409.10197, as in the authors' llava/eval/statistical_analysis.py (ywh187/FitPrune). For a tolerance alpha, every
layer runs on the tokens that the layers before it left. It sorts them by the attention that they receive from text (cross) and
from visual tokens (self). In each order it finds the longest run of least attended tokens whose removal leaves at least (1 -
alpha) of the sum in the unpruned model, and deletes the tokens that are in both runs. The authors find the tolerance by bisection
against a budget, to a width of 0.01. Here the tolerances that the bisection may visit are counted in steps of 1/64, so that
counts can be added over samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from edgeprune.calibration.data.statistics import GAMMA_BINS, PARTS, SHARES, STEPS, TOLERANCES, StatisticsSource
from edgeprune.calibration.replay.episodes import Recorder, Recording, divergence, limit_visual
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.methods.base import LayerView
from edgeprune.methods.fitprune import attention_received
from edgeprune.methods.plphp import vision_attention_score
from edgeprune.model import LayerCache, PrunedDecoder, Segment, StepOutput
from edgeprune.model.attention import TokenRows
from edgeprune.model.cache import LayerStates
from edgeprune.model.decoder import Probe
from edgeprune.plan import KeepPlan, keep_count_up


class Deletions:
    """Deletes FitPrune's tokens in each layer of a forward pass, at one tolerance.

    `cross`, `within` [layers]: the attention that all visual tokens together receive from text and from visual tokens in the
    unpruned model, each the mean over the queries. `counts`: the visual tokens that entered each layer so far.
    """

    def __init__(self, alpha: float, cross: Sequence[float], within: Sequence[float]) -> None:
        self._left = [[(1 - alpha) * total for total in totals] for totals in (cross, within)]
        self.counts: list[int] = []

    def __call__(self, layer: int, view: LayerView) -> torch.Tensor:
        """Return the positions of the tokens that stay behind the attention of a layer."""
        tokens = view.order.shape[0]
        self.counts.append(tokens)
        dropped = np.ones(tokens, bool)
        for mass, left in zip(mean_received(view), self._left, strict=True):
            dropped &= _droppable(mass, left[layer])
        return torch.from_numpy(np.flatnonzero(~dropped)).to(view.order.device)


def mean_received(view: LayerView) -> tuple[np.ndarray, np.ndarray]:
    """Return the attention that each visual token receives from text and from visual tokens [V], both the mean over the queries."""
    cross, within = attention_received(view)
    return cross.double().cpu().numpy(), within.double().cpu().numpy() / max(within.shape[0], 1)


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
        self._unpruned = PrunedDecoder(loaded.family.decoder(), base).eval()

    @torch.no_grad()
    def measure(self, recordings: Sequence[Recording], parts: Sequence[str] = tuple(PARTS)) -> dict[str, np.ndarray]:
        """Return a sample's contribution to every sum of some parts, by name: the mean over the recordings of its images."""
        by_part = {
            "attention": self._attention,
            "caches": self._caches,
            "withdrawals": self._withdrawals,
            "fitprune": self._fitprune,
        }
        found: dict[str, np.ndarray] = {}
        for part in parts:
            shapes = {name: shape for name, shape in self._source.shapes().items() if name in PARTS[part]}
            measured = []
            for recording in recordings:
                values = {name: np.zeros(shape) for name, shape in shapes.items()}
                by_part[part](recording, values)
                measured.append(values)
            found |= {name: np.mean([values[name] for values in measured], axis=0) for name in shapes}
        return found

    def _attention(self, recording: Recording, values: dict[str, np.ndarray]) -> None:
        def probe_prompt(layer: int, view: LayerView) -> None:
            gamma = float(vision_attention_score(view.attention()))
            values["gamma"][layer, min(int(gamma * GAMMA_BINS), GAMMA_BINS - 1)] = 1.0

        kept = self._prefill(recording, probe_prompt).kept
        if not recording.steps:
            return

        def probe_answer(layer: int, view: LayerView) -> None:
            received = _attention_shares(view)
            values["coverage"][layer] = np.stack(
                [received[:, : keep_count_up(received.shape[1], share)].sum(axis=1) for share in SHARES], axis=1
            )
            np.put_along_axis(values["habit"][layer], kept[layer].cpu().numpy(), received, axis=1)

        unpruned = self._recorder.replay(recording, text_groups=recording.groups, probe=probe_answer)
        assert unpruned.split is not None
        for step, split in enumerate(unpruned.split.cpu().numpy()):
            values["split"][min(step, STEPS - 1)] += split
            values["steps"][min(step, STEPS - 1)] += 1.0

    def _prefill(self, recording: Recording, probe: Probe) -> StepOutput:
        decoder = self._recorder.decoder
        output: StepOutput = decoder(*self._recorder.segments(recording), decoder.empty_caches(), probe=probe)
        return output

    def _caches(self, recording: Recording, values: dict[str, np.ndarray]) -> None:
        # Before the layer whose cache is cut, an answer runs as without cuts.
        if not recording.steps:
            return
        decoder, answer, caches = self._recorder.decoder, recording.answer, recording.caches
        nothing = Segment(answer.embeds[:, :0], answer.positions[:, :0])
        entering = _through(decoder, decoder.rows_of(nothing, nothing, answer, every_logit=True), caches, every_logit=True)
        unpruned = decoder.logits_of(entering[-1], every_logit=True)[0]
        for layer in range(self._source.layers):
            for index, share in enumerate(SHARES):
                cut = limit_visual(caches, [layer], share)
                behind = _through(decoder, entering[layer], cut, layer, every_logit=True)[-1]
                output = decoder.logits_of(behind, every_logit=True)[0]
                values["cache_kl"][layer, index] = float(divergence(unpruned, output).sum())
                changed = unpruned.argmax(dim=-1) != output.argmax(dim=-1)
                values["cache_flips"][layer, index] = float(changed.double().sum())

    def _withdrawals(self, recording: Recording, values: dict[str, np.ndarray]) -> None:
        # Before the layer from which the visual tokens are gone, a prompt runs as without cuts.
        decoder = self._unpruned
        caches = decoder.empty_caches()
        entering = _through(decoder, decoder.rows_of(*self._recorder.segments(recording)), caches)
        unpruned, nothing = decoder.logits_of(entering[-1])[0], torch.zeros(0, dtype=torch.int64, device=entering[0].hidden.device)
        for layer in range(self._source.layers):
            behind = _through(decoder, entering[layer].keep(nothing), caches, layer)[-1]
            values["withdrawn_kl"][layer] = float(divergence(decoder.logits_of(behind)[0], unpruned).mean())

    def _fitprune(self, recording: Recording, values: dict[str, np.ndarray]) -> None:
        cross, within = list[float](), list[float]()

        def probe(layer: int, view: LayerView) -> None:
            for totals, received in zip((cross, within), mean_received(view), strict=True):
                totals.append(float(received.sum()))

        self._prefill(recording, probe)
        values["fitprune"] += np.stack([self._deletions(recording, alpha, cross, within) for alpha in TOLERANCES])

    def _deletions(self, recording: Recording, alpha: float, cross: list[float], within: list[float]) -> np.ndarray:
        deletions = Deletions(alpha, cross, within)
        self._unpruned(*self._recorder.segments(recording), self._unpruned.empty_caches(), delete=deletions)
        return np.array(deletions.counts, np.float64)


def _through(
    decoder: PrunedDecoder,
    tokens: TokenRows,
    caches: Sequence[LayerCache | LayerStates],
    first: int = 0,
    *,
    every_logit: bool = False,
) -> list[TokenRows]:
    # The tokens as they enter each layer from `first` on, and behind the last.
    entering = [tokens]
    for layer in range(first, len(caches)):
        entering.append(decoder.run_layer(layer, entering[-1], caches[layer], every_logit=every_logit)[0])
    return entering


def _attention_shares(view: LayerView) -> np.ndarray:
    # The share [KV heads, K] of the answer's attention to visual tokens that each of them receives, in rank order.
    columns = view.past_attention().double().mean(dim=1)  # [heads, K]
    grouped = columns.view(view.kv_heads, -1, columns.shape[1]).mean(dim=1)
    received: np.ndarray = (grouped / grouped.sum(dim=1, keepdim=True).clamp_min(1e-12)).cpu().numpy()
    return received
