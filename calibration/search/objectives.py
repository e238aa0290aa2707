"""Cost and agreement of a plan: the two objectives of a search.

Cost is a share of the decoder's visual work or of its visual KV cache, or the TTFT in ms on a device, including the vision encoder.
The shares exclude the encoder: if it dominates the work, no later cut could reach a quarter of the total. Agreement compares the
answers under a plan with those of the unpruned model, so samples need no reference answers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace

import numpy as np
import torch

from edgeprune.calibration.data.journal import Journal
from edgeprune.calibration.data.samples import Sample, Score, score
from edgeprune.calibration.replay.episodes import Recorder, divergence
from edgeprune.calibration.replay.reference import SHARED, Shared, reference_model
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.device.jetson import Module, module_named
from edgeprune.device.profile import PARTS, TEXT, DeviceProfile
from edgeprune.families.base import DecoderParts, encoder_work
from edgeprune.io.progress import SILENT, Count, Progress
from edgeprune.plan import Geometry, KeepPlan
from edgeprune.runtime import Answer, Runtime
from edgeprune.tabletop.questions import DESCRIBE

_EFFICIENCY = 0.5, 0.7  # of peak compute and bandwidth; the middle of what engines usually reach


@dataclass(frozen=True)
class RooflineTimes(DeviceProfile):
    """Times computed from a device's peak figures. `vision_least_ms`: time to read the vision encoder's weights, a lower bound."""

    vision_least_ms: float = 0.0


def visual_flops(parts: DecoderParts, plan: KeepPlan) -> float:
    """Return the operations that visual tokens cause in prefill under a plan, summed over the layers.

    Every visual token of a layer passes through its matrices (2 operations per weight) and attends to all tokens before it.
    """
    total = 0.0
    attention = 2.0 * parts.heads * parts.head_dim  # per pair of tokens: two products, causal (half of the pairs)
    for index, layer in enumerate(parts.layers):
        weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 2)
        alive = plan.tokens_at_layer(index)
        total += 2.0 * weights * alive + attention * alive * (alive + 2 * TEXT)
    return total


def flops_share(parts: DecoderParts, plan: KeepPlan, unpruned: KeepPlan) -> float:
    """Return the plan's visual operations in prefill as a share of the unpruned plan's, without the vision encoder."""
    return visual_flops(parts, plan) / visual_flops(parts, unpruned)


def kv_share(plan: KeepPlan, unpruned: KeepPlan) -> float:
    """Return the plan's visual KV cache after prefill as a share of the unpruned plan's."""
    return sum(map(plan.tokens_cached, range(plan.layers))) / sum(map(unpruned.tokens_cached, range(unpruned.layers)))


def predicted_ttft(times: DeviceProfile, plan: KeepPlan, blocks: int = 1) -> float:
    """Return the predicted TTFT in ms: the vision encoder for the plan's image, plus prefill interpolated per layer.

    The cost of each of the encoder's `blocks` is assumed proportional to its tokens, with `vision_least_ms` as the lower bound of
    their sum if known. Token selection, a few per cent, is not included.
    """
    known = np.linspace(0, times.tokens, PARTS + 1)
    prefill = [float(np.interp(plan.tokens_at_layer(layer), known, times.prefill_ms)) for layer in range(plan.layers)]
    return encoder_ms(times, plan, blocks) + sum(prefill) / plan.layers


def encoder_ms(times: DeviceProfile, plan: KeepPlan, blocks: int) -> float:
    """Return the predicted time in ms of the vision encoder's `blocks` under a plan (see `predicted_ttft`)."""
    share = sum(map(plan.encoding, range(blocks))) / (blocks * times.tokens)
    return max(times.vision_ms * share, times.vision_least_ms if isinstance(times, RooflineTimes) else 0.0)


def roofline_times(loaded: LoadedModel, geometry: Geometry, device: str) -> RooflineTimes:
    """Return the FP16 roofline times of a device: the larger of operations over compute and bytes over bandwidth.

    `device`: a module name of `edgeprune.device.jetson`. Raises UsageError for an unknown name.
    """
    module = module_named(device)
    parts = loaded.family.decoder()
    tower = loaded.family.vision(geometry)
    vision = _milliseconds(module, encoder_work(tower).total, tower)
    weights = sum(parameter.numel() for parameter in parts.layers.parameters())
    attention = 2.0 * parts.heads * parts.head_dim * len(parts.layers)
    counts = [geometry.tokens * part // PARTS + TEXT for part in range(PARTS + 1)]
    prefill = [_milliseconds(module, 2.0 * weights * n + attention * n * n, parts.layers) for n in counts]
    return RooflineTimes(
        device, "roofline", geometry.tokens, vision, tuple(prefill), vision_least_ms=_milliseconds(module, 0.0, tower)
    )


def _milliseconds(module: Module, operations: float, part: torch.nn.Module) -> float:
    compute, bandwidth = _EFFICIENCY
    size = 2.0 * sum(parameter.numel() for parameter in part.parameters())
    return 1e3 * max(operations / (module.tflops() * 1e12 * compute), size / (module.bandwidth * 1e9 * bandwidth))


@dataclass(frozen=True)
class Agreed:
    """How far answers agree with the unpruned ones: `mean`, 0 to 1, and the `facts` of descriptions, added up.

    The mean is over samples, or, where some are descriptions and some not, of the means of both: however few the descriptions, a
    plan that spoils them is not agreed with.

    `complete`: False if the rest was not asked, because the mean could not reach what it had to; it then counts as wrong.
    """

    mean: float
    facts: Score = field(default_factory=Score)
    complete: bool = True


class Agreement:
    """Scores plans against the answers of the unpruned model, which are generated once.

    A plan retells each of them: it chooses every token after the unpruned answer's own tokens before it (teacher forcing), in
    two forward passes however long the answer is. What it retells equals the answer exactly where what it would generate does. In
    a description, facts behind a wrong one are judged as if that had been right. Plans with a decode cut generate, because what a
    step reads depends on the steps before it.

    `journal`: keeps what is measured, of these samples and this model alone.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        unpruned: KeepPlan,
        samples: Sequence[Sample],
        *,
        max_tokens: int,
        fit: str,
        device: str,
        progress: Progress = SILENT,
        journal: Journal | None = None,
    ) -> None:
        self._loaded, self._max_tokens, self._fit, self._device = loaded, max_tokens, fit, device
        self._unpruned, self._shared = unpruned, Shared(SHARED)
        self._journal = Journal() if journal is None else journal
        self._samples: list[Sample] = []
        self._ended: list[bool] = []  # which answers the model ended itself
        counted = progress.count("answering without pruning, samples", len(samples))
        fresh = self._each_answer(unpruned, (sample for number, sample in enumerate(samples) if not self._answered(number)))
        for number, sample in enumerate(samples):
            if not self._answered(number):
                answer = next(fresh)
                self._journal.put([answer.text, answer.receipt.finish_reason == "end"], "answer", number)
            text, ended = self._journal.get("answer", number)
            self._samples.append(replace(sample, answer=text, accepted=()))
            self._ended.append(ended)
            counted(number + 1)

    def __len__(self) -> int:
        return len(self._samples)

    def check(self, plan: KeepPlan) -> None:
        """Raise PlanError if the model does not support a plan."""
        self._loaded.check_plan(plan)

    def score(self, plan: KeepPlan, count: int, progress: Count = lambda done: None, least: float = 0.0) -> Agreed:
        """Return the agreement over the first `count` samples (`Agreed`): 1 for an equal answer, the F1 of a description's facts.

        Samples that the plan has answered are not asked again. Those left are not asked once the mean cannot reach `least`.
        """
        name = _name(plan)
        known = itertools.takewhile(bool, (self._journal.get("score", name, number) for number in range(len(self))))
        points = [Score(*values) for values in known]
        weights, begin = self._weights(count), len(points)
        if plan.decode is None:
            missing, answers = self._retellings(count)[begin:], self._each_retelling(plan, range(begin, count))
        else:
            missing = self._samples[begin:count]
            answers = (answer.text for answer in self._each_answer(plan, missing))

        def reached() -> float:
            return sum(weight * point.f1 for weight, point in zip(weights, points, strict=False))

        for sample, text in zip(missing, answers, strict=True):
            points.append(score(sample, text))
            self._journal.put(astuple(points[-1]), "score", name, len(points) - 1)
            progress(len(points))
            if reached() + sum(weights[len(points) :]) < least - 1e-9:
                break
        asked = points[:count]
        described = [point for sample, point in zip(self._samples, asked, strict=False) if sample.kind == DESCRIBE]
        return Agreed(reached(), sum(described, Score()), len(asked) == count)

    def _weights(self, count: int) -> list[float]:
        # Of the first samples: descriptions together as much as all others.
        kinds = [sample.kind == DESCRIBE for sample in self._samples[:count]]
        return [1 / (len(set(kinds)) * kinds.count(kind)) for kind in kinds]

    def divergences(self, plans: Sequence[KeepPlan], progress: Count = lambda done: None) -> list[float]:
        """Return each plan's KL divergence in nats from the unpruned model on its answers (teacher forcing), mean over samples.

        This distinguishes plans that agree equally well on few samples. `progress` is called with the number of finished samples.
        """
        names = [_name(plan) for plan in plans]
        recorders = [Recorder(self._loaded, plan, 1, self._device, self._shared) for plan in (self._unpruned, *plans)]
        totals = [0.0] * len(plans)
        for number in range(len(self)):
            if any(self._journal.get("divergence", name, number) is None for name in names):
                for name, found in zip(names, self._diverged(recorders, number), strict=True):
                    self._journal.put(found, "divergence", name, number)
            for index, name in enumerate(names):
                totals[index] += self._journal.get("divergence", name, number)
            progress(number + 1)
        return [total / len(self) for total in totals]

    def _diverged(self, recorders: Sequence[Recorder], number: int) -> list[float]:
        # Of each recorder from the first one, on one sample.
        sample = self._samples[number]
        first, *others = recorders
        ids = first.tokenizer.encode(sample.answer)
        expected = first.teacher_forced_logits(sample, ids, self._fit)
        return [float(divergence(expected, each.teacher_forced_logits(sample, ids, self._fit)).sum()) for each in others]

    def _answered(self, number: int) -> bool:
        return self._journal.get("answer", number) is not None

    def _retellings(self, count: int) -> list[Sample]:
        # The first samples, with the unpruned answers as the unpruned plan retells them.
        missing = [number for number in range(count) if self._journal.get("retold", number) is None]
        for number, answer in zip(missing, self._each_retelling(self._unpruned, missing), strict=True):
            self._journal.put(answer, "retold", number)
        return [replace(self._samples[number], answer=self._journal.get("retold", number)) for number in range(count)]

    def _each_retelling(self, plan: KeepPlan, numbers: Iterable[int]) -> Iterator[str]:
        recorder = Recorder(self._loaded, plan, 1, self._device, self._shared)
        for number in numbers:
            sample = self._samples[number]
            ids = recorder.tokenizer.encode(sample.answer)
            logits = recorder.teacher_forced_logits(sample, ids, self._fit)[: len(ids) + self._ended[number]]
            yield recorder.tokenizer.decode(logits.argmax(dim=-1).tolist())

    def _each_answer(self, plan: KeepPlan, samples: Iterable[Sample]) -> Iterator[Answer]:
        runtime = Runtime(reference_model(self._loaded, plan, self._device, self._shared))
        for sample in samples:
            yield runtime.generate(sample.image, sample.prompt, fit=self._fit, max_tokens=self._max_tokens)


def _name(plan: KeepPlan) -> str:
    return hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()
