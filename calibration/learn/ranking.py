"""`calibrate --rows learned`: how caches are ranked, by one ridge regression for each layer (`edgeprune.methods.ranking`).

The unpruned model answers every sample. A token's target for a KV head is the logarithm of the highest attention that it gets from
any row that gives a token of the answer: the last one of the prompt, and those of the answer itself. Within images, features and
targets count by their difference from the mean, since only the order matters. Each feature is penalized in proportion to how much
it varies. All of it follows from sums over the tokens, so samples are streamed and memory does not grow with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from edgeprune.calibration.collect.run import CollectOptions
from edgeprune.calibration.data.samples import Sample
from edgeprune.calibration.replay.episodes import Recorder, Recording
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import UsageError
from edgeprune.io.progress import Progress
from edgeprune.methods.base import LayerView
from edgeprune.methods.ranking import features, logarithms, write
from edgeprune.plan import KeepPlan, Weights

RIDGE = 1e-3  # of a feature's own sum of squares; from 1e-4 to 1e-2 it makes no difference on the bundled model
_TINY = 1e-9


@dataclass
class LayerSums:
    """Sums over the visual tokens of one layer in float64: `products` [F, F] of features, `toward` [F, kv heads] with targets."""

    products: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    toward: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, rows: torch.Tensor, targets: torch.Tensor) -> None:
        """Add the features [V, F] of an image and their targets [V, kv heads]."""
        rows, targets = (each.double() - each.double().mean(dim=0) for each in (rows, targets))
        self.products = self.products + rows.T @ rows
        self.toward = self.toward + rows.T @ targets

    def solution(self) -> torch.Tensor:
        """Return the weights [F, kv heads]."""
        varies = self.products.diagonal()
        penalty = RIDGE * varies + _TINY * varies.max().clamp_min(_TINY)  # what never varies has no weight
        weights: torch.Tensor = torch.linalg.solve(self.products + torch.diag(penalty), self.toward)
        return weights


def learn_ranking(
    loaded: LoadedModel, samples: Sequence[Sample], base: KeepPlan, request: CollectOptions, progress: Progress
) -> Weights:
    """Return the weights of a ranking of the caches of `base`, which has no cuts of caches.

    Raises UsageError if `base` names weights already, since a plan has those of one method, and BadSampleError for a sample that
    cannot be used.
    """
    if base.weights:
        raise UsageError("A plan has the weights of one method, and --onto names some.", hint="Rank by --rows peak.")
    recorder = Recorder(loaded, base, request.max_tokens, request.device)
    sums = [LayerSums() for _ in range(base.layers)]
    counted = progress.count("learning to rank, samples", len(samples))
    for done, sample in enumerate(samples, start=1):
        for recording in recorder.record(sample, request.fit):
            add_recording(sums, recorder, recording, request.reduce)
        counted(done)
    return write(torch.stack([each.solution() for each in sums]), {"weights_sha256": loaded.weights_sha256})


@torch.no_grad()
def add_recording(sums: Sequence[LayerSums], recorder: Recorder, recording: Recording, reduce: str) -> None:
    """Add what prefill has of each visual token, and the attention that it then gets, to the sums of each layer."""
    tokens = recorder.plan.geometry.tokens
    known, targets = dict[int, torch.Tensor](), dict[int, torch.Tensor]()

    def at_prefill(layer: int, view: LayerView) -> None:
        known[layer] = features(view, reduce, tokens)
        targets[layer] = logarithms(view.attention()[:, None], view.kv_heads, reduce, tokens)

    def while_answering(layer: int, view: LayerView) -> None:
        attended = logarithms(view.past_attention(), view.kv_heads, reduce, tokens)
        targets[layer] = torch.maximum(targets[layer], attended)

    recorder.decoder(*recorder.segments(recording), recorder.decoder.empty_caches(), probe=at_prefill)
    if recording.steps:
        recorder.replay(recording, probe=while_answering)
    for layer, rows in known.items():
        sums[layer].add(rows, targets[layer].transpose(0, 1))
