"""How well a plan's answers agree with the unpruned model's, on samples without known answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgeprune.calibration.episodes import Episodes
from edgeprune.calibration.measuring import divergence
from edgeprune.calibration.reference import reference_model
from edgeprune.calibration.samples import Sample, score
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.plan import KeepPlan
from edgeprune.runtime import Runtime


class Agreement:
    """Scores plans against the answers of the unpruned model, which are asked for once."""

    def __init__(
        self, loaded: LoadedModel, whole: KeepPlan, samples: Sequence[Sample], *, max_tokens: int, fit: str, device: str
    ) -> None:
        self._loaded, self._max_tokens, self._fit, self._device = loaded, max_tokens, fit, device
        self._whole = whole
        answers = self._answers(whole, samples)
        self._samples = [replace(sample, answer=answer) for sample, answer in zip(samples, answers, strict=True)]

    def __len__(self) -> int:
        return len(self._samples)

    def check(self, plan: KeepPlan) -> None:
        """Raise PlanError when the model cannot be asked under a plan."""
        self._loaded.check_plan(plan)

    def score(self, plan: KeepPlan, count: int) -> float:
        """Return the mean score over the first `count` samples: 1 for an equal answer, for a description the share of facts."""
        samples = self._samples[:count]
        points = [score(sample, text) for sample, text in zip(samples, self._answers(plan, samples), strict=True)]
        return sum(min(point.right / point.of, point.recall) for point in points) / len(points)

    def divergences(self, plans: Sequence[KeepPlan]) -> list[float]:
        """Return for each plan how far it is from the unpruned model when retelling its answers: KL divergence in nats, mean
        over samples.

        Finer than agreement: it tells apart plans that answer a few samples alike.
        """
        whole, *pruned = (Episodes(self._loaded, plan, 1, self._device) for plan in (self._whole, *plans))
        codec = reference_model(self._loaded, self._whole, self._device).codec
        totals = [0.0] * len(pruned)
        for sample in self._samples:
            ids = codec.encode(sample.answer)
            expected = whole.retold(sample, ids, self._fit)
            for index, episodes in enumerate(pruned):
                totals[index] += float(divergence(expected, episodes.retold(sample, ids, self._fit)).sum())
        return [total / len(self._samples) for total in totals]

    def _answers(self, plan: KeepPlan, samples: Sequence[Sample]) -> list[str]:
        runtime = Runtime(reference_model(self._loaded, plan, self._device))
        ask = [(sample.image, sample.prompt) for sample in samples]
        return [runtime.generate(*question, fit=self._fit, max_tokens=self._max_tokens).text for question in ask]
