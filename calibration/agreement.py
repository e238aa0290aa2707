"""How well a plan's answers agree with the unpruned model's, on samples without known answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgeprune.calibration.reference import reference_model
from edgeprune.calibration.samples import Sample, score
from edgeprune.loading import LoadedModel
from edgeprune.plan import KeepPlan
from edgeprune.runtime import Runtime


class Agreement:
    """Scores plans against the answers of the unpruned model, which are asked for once."""

    def __init__(
        self, loaded: LoadedModel, whole: KeepPlan, samples: Sequence[Sample], *, max_tokens: int, fit: str, device: str
    ) -> None:
        self._loaded, self._max_tokens, self._fit, self._device = loaded, max_tokens, fit, device
        self._samples: list[Sample] = []
        answers = self._answers(whole, samples)
        self._samples = [replace(sample, answer=answer) for sample, answer in zip(samples, answers, strict=True)]

    def __len__(self) -> int:
        return len(self._samples)

    def score(self, plan: KeepPlan, count: int) -> float:
        """Return the mean score over the first `count` samples: 1 for an equal answer, for a description the share of facts."""
        samples = self._samples[:count]
        points = [score(sample, text) for sample, text in zip(samples, self._answers(plan, samples), strict=True)]
        return sum(min(point.right / point.of, point.recall) for point in points) / len(points)

    def _answers(self, plan: KeepPlan, samples: Sequence[Sample]) -> list[str]:
        runtime = Runtime(reference_model(self._loaded, plan, self._device))
        ask = [(sample.image, sample.prompt) for sample in samples]
        return [runtime.generate(*question, fit=self._fit, max_tokens=self._max_tokens).text for question in ask]
