"""`calibrate --rows learned`: how caches are ranked, by one ridge regression for each layer (`edgeprune.methods.ranking`).

The unpruned model answers every sample. A token's target for a KV head is the logarithm of the highest attention that it gets from
any row that gives a token of the answer: the last one of the prompt, and those of the answer itself. Within images, features and
targets count by their difference from the mean, since only the order matters. Each feature is penalized in proportion to how much
it varies. All of it follows from sums over the tokens, so samples are streamed and memory does not grow with them.

Every fourth image is held out at first: it judges what the others teach, beside the orders of PLPHP that learn nothing. Then it is
learned from as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from edgeprune.calibration.collect.run import SAVE_EVERY, CollectOptions
from edgeprune.calibration.data.samples import Sample, asked_digest, digest
from edgeprune.calibration.learn.run import HELD_OUT, MOST_HELD_OUT, Rival
from edgeprune.calibration.replay.episodes import Recorder, Recording, divergence, limit_visual
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.io.files import write_bytes
from edgeprune.io.progress import Progress
from edgeprune.methods.base import LayerView
from edgeprune.methods.ranking import features, logarithms, write
from edgeprune.plan import KeepPlan, Weights
from edgeprune.plan.presets import ranked_plan

# The orders without learning.
RIVALS: tuple[Mapping[str, Any], ...] = tuple(
    {"rows": rows, "reduce": reduce} for rows in ("last", "text", "peak") for reduce in ("mean", "max")
)
RIDGE = 1e-3  # of a feature's own sum of squares; from 1e-4 to 1e-2 it makes no difference on the bundled model
_TINY = 1e-9
_SUMMED = ("products", "toward")


@dataclass(frozen=True)
class LearnedRanking:
    """Learned weights of a ranking, and how what three quarters of the images teach compares on the rest.

    `divergence` from the unpruned model in nats an answer, with `share` of every cache, over the `answers` of more than one token;
    `rivals`: of PLPHP's orders that learn nothing, the best first. Without such an answer they are all 0.
    """

    weights: Weights
    answers: int
    share: float
    divergence: float
    rivals: tuple[Rival, ...]

    @property
    def ahead(self) -> bool:
        """Whether the learned order is closer to the unpruned model than every rival."""
        return self.divergence < self.rivals[0].divergence


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
    loaded: LoadedModel,
    samples: Sequence[Sample],
    base: KeepPlan,
    request: CollectOptions,
    share: float,
    output: Path,
    progress: Progress,
) -> LearnedRanking:
    """Learn a ranking of the caches of `base`, which has no cuts of caches, and compare it where caches keep `share` of themselves.

    A run that is interrupted, or that a bad sample ends, leaves a file beside `output`, and the same request goes on from there.
    Raises UsageError if `base` names weights already, since a plan has those of one method, and BadSampleError for a sample that
    cannot be used.
    """
    if base.weights:
        raise UsageError("A plan has the weights of one method, and --onto names some.", hint="Rank by --rows peak.")
    rest, held = _split(samples)
    partial = output.with_name(f".{output.name}.{_digest(loaded, samples, base, request, share)}.ranking")
    state = _load(partial, request.device) if partial.is_file() else _State(0, tuple(LayerSums() for _ in range(base.layers)))
    recorder = Recorder(loaded, base, request.max_tokens, request.device)
    comparison: _Comparison | None = None
    counted = progress.count("learning to rank, samples", len(samples))
    try:
        for sample in [*rest, *held][state.done :]:
            if state.done >= len(rest):
                judged = _solutions(state.sums) if state.judged is None else state.judged
                state = replace(state, judged=judged)
                comparison = comparison or _Comparison(loaded, base, request, share, judged)
            counted(state.done)
            state = _with_sample(state, recorder, sample, request, comparison)
            if state.done % SAVE_EVERY == 0:
                _save(partial, state)
    except (KeyboardInterrupt, EdgePruneError):
        _save(partial, state)
        raise
    counted(state.done)
    partial.unlink(missing_ok=True)
    weights = write(_solutions(state.sums), {"weights_sha256": loaded.weights_sha256})
    own, *others = (total / max(state.answers, 1) for total in state.divergences)
    rivals = [Rival("plphp", order, each) for order, each in zip(RIVALS, others, strict=True)]
    return LearnedRanking(weights, state.answers, share, own, tuple(sorted(rivals, key=lambda rival: rival.divergence)))


def _split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    # Those to learn from first, and those that judge: about every fourth image, or group of images that are asked about together.
    images = list(dict.fromkeys(sample.images for sample in samples))
    held = set(images[HELD_OUT - 1 :: HELD_OUT][:MOST_HELD_OUT])
    return [each for each in samples if each.images not in held], [each for each in samples if each.images in held]


@dataclass(frozen=True)
class _State:
    # What a run has after `done` samples. `judged` [layers, F, kv heads]: the weights that the held-out samples judge, once there
    # are any. `divergences` of the learned order and of each of RIVALS, summed over `answers`.
    done: int
    sums: tuple[LayerSums, ...]
    judged: torch.Tensor | None = None
    answers: int = 0
    divergences: tuple[float, ...] = (0.0,) * (1 + len(RIVALS))


class _Comparison:
    """How far answers move if all caches keep `share` of themselves, by the learned order and by those that learn nothing."""

    def __init__(self, loaded: LoadedModel, base: KeepPlan, request: CollectOptions, share: float, judged: torch.Tensor) -> None:
        weights = write(judged, {"weights_sha256": loaded.weights_sha256})
        learned = ranked_plan(base, weights=weights, rows=request.rows, reduce=request.reduce, spread=request.spread)
        plans = [learned, *(ranked_plan(base, **order, spread=request.spread) for order in RIVALS)]
        self._rankers = [Recorder(loaded, plan, request.max_tokens, request.device) for plan in plans]
        self._layers, self._share = range(base.layers), share

    def divergences(self, recorder: Recorder, recording: Recording) -> list[float]:
        """Return the KL divergence in nats from the whole caches, for each order, summed over the answer."""
        expected, found = recorder.replay(recording).logits[0], list[float]()
        for ranker in self._rankers:
            kept = limit_visual(ranker.with_caches(recording).caches, self._layers, self._share)
            found.append(float(divergence(expected, ranker.replay(recording, kept).logits[0]).sum()))
        return found


def _with_sample(
    state: _State, recorder: Recorder, sample: Sample, request: CollectOptions, comparison: _Comparison | None
) -> _State:
    sums, answers, totals = [replace(each) for each in state.sums], state.answers, list(state.divergences)
    for recording in recorder.record(sample, request.fit):
        add_recording(sums, recorder, recording, request.reduce)
        if comparison is not None and recording.steps:  # the first token of an answer comes before the caches are cut
            answers += 1
            totals = [sum(pair) for pair in zip(totals, comparison.divergences(recorder, recording), strict=True)]
    return replace(state, done=state.done + 1, sums=tuple(sums), answers=answers, divergences=tuple(totals))


def _solutions(sums: Sequence[LayerSums]) -> torch.Tensor:
    return torch.stack([each.solution() for each in sums])


def _save(path: Path, state: _State) -> None:
    from safetensors.torch import save

    tensors = {f"{name}.{layer}": getattr(each, name) for layer, each in enumerate(state.sums) for name in _SUMMED}
    tensors |= {} if state.judged is None else {"judged": state.judged}
    known = {"done": state.done, "answers": state.answers, "divergences": state.divergences}
    write_bytes(path, save({name: each.cpu().contiguous() for name, each in tensors.items()}, {"state": json.dumps(known)}))


def _load(path: Path, device: str) -> _State:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        known = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118  # safe_open is not iterable
    layers = sum(name.startswith("toward.") for name in tensors)
    sums = tuple(LayerSums(*(tensors[f"{name}.{layer}"] for name in _SUMMED)) for layer in range(layers))
    return _State(known["done"], sums, tensors.get("judged"), known["answers"], tuple(known["divergences"]))


def _digest(loaded: LoadedModel, samples: Sequence[Sample], base: KeepPlan, request: CollectOptions, share: float) -> str:
    # Part of the file's name, so that what another request left is not taken.
    return digest(loaded.weights_sha256, base.to_dict(), asdict(replace(request, weights=None)), share, asked_digest(samples))


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
