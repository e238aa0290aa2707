"""Evaluate a model over samples: accuracy of pruned and unpruned answers, and their agreement."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeprune.calibration.cluster import Cluster
from edgeprune.calibration.data.samples import BadSampleError, OnBadSample, Sample, Score
from edgeprune.calibration.metrics import AS_BEFORE, Metric
from edgeprune.calibration.predictions import Prediction, Predictions
from edgeprune.errors import UsageError
from edgeprune.plan.tiers import tier_number
from edgeprune.runtime import Answer, Runtime

ALL, SHORT, EVERY = "all short answers", "describe", "all"
PRUNED, UNPRUNED = "pruned", "unpruned"


@dataclass
class KindScore:
    """Totals for one kind of prompt: `points` by variant; `agreed` of `total` pruned answers equal the unpruned ones.

    `visual_reads`: the share of visual KV entries that decode steps read, summed over the pruned answers.
    """

    metric: Metric = AS_BEFORE
    total: int = 0
    points: dict[str, Score] = field(default_factory=lambda: {PRUNED: Score(), UNPRUNED: Score()})
    agreed: int = 0
    visual_reads: float = 0.0

    def accuracy(self, variant: str) -> float:
        """Return the metric of a variant (PRUNED or UNPRUNED): by default the share of right short answers, or the F1 of facts."""
        return self.metric.value(self.points[variant], self.total)

    @property
    def agreement(self) -> float:
        """The share of pruned answers that equal the unpruned ones exactly."""
        return self.agreed / self.total if self.total else 0.0


@dataclass
class Cost:
    """Costs of the answers of one variant: TTFT and time per token in ms, and KV cache bytes at the end of each answer.

    `visual_kv`: the share of visual KV entries that was held.
    """

    ttft_ms: list[float] = field(default_factory=list)
    ms_per_token: list[float] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)
    visual_kv: list[float] = field(default_factory=list)

    def add(self, answer: Prediction) -> None:
        """Add the costs of one answer."""
        self.ttft_ms.append(answer.ttft_ms)
        self.ms_per_token += answer.decode_ms
        self.kv_bytes.append(answer.kv_bytes)
        self.visual_kv.append(answer.visual_kv)

    def to_dict(self) -> dict[str, float]:
        """Return medians as JSON data."""
        return {
            "ttft_ms": statistics.median(self.ttft_ms or [0.0]),
            "ms_per_token": statistics.median(self.ms_per_token or [0.0]),
            "kv_bytes": statistics.median(self.kv_bytes or [0]),
            "visual_kv": statistics.median(self.visual_kv or [1.0]),
        }


@dataclass
class EvalReport:
    """Scores per kind of prompt, and the costs of both variants. Without cuts in the plan, only UNPRUNED has values."""

    pruned: bool
    kinds: dict[str, KindScore] = field(default_factory=dict)
    cost: dict[str, Cost] = field(default_factory=lambda: {PRUNED: Cost(), UNPRUNED: Cost()})
    metric: Metric = AS_BEFORE

    def add(self, sample: Sample, answers: Mapping[str, Answer | Prediction]) -> None:
        """Score the answers to one sample, by variant."""
        entry = self.kinds.setdefault(sample.kind or "question", KindScore(self.metric))
        entry.total += 1
        said = {name: each if isinstance(each, Prediction) else Prediction.of(each) for name, each in answers.items()}
        for variant, answer in said.items():
            entry.points[variant] += self.metric.score(sample, answer.text)
            self.cost[variant].add(answer)
        if PRUNED in said:
            entry.visual_reads += said[PRUNED].visual_reads
            entry.agreed += said[PRUNED].text == said[UNPRUNED].text

    def rows(self) -> dict[str, KindScore]:
        """Return the kinds in order of appearance, then their total; without a metric that was asked for, over short answers alone.

        Descriptions then count facts.
        """
        total, by_default = KindScore(self.metric), self.metric is AS_BEFORE
        for kind, entry in self.kinds.items():
            if by_default and kind == SHORT:
                continue
            total.total += entry.total
            total.agreed += entry.agreed
            total.visual_reads += entry.visual_reads
            for variant in (PRUNED, UNPRUNED):
                total.points[variant] += entry.points[variant]
        return {**self.kinds, ALL if by_default else EVERY: total}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON data; with several measures, each of them by variant."""
        variants = (PRUNED, UNPRUNED) if self.pruned else (UNPRUNED,)
        kinds: dict[str, Any] = {}
        for kind, entry in self.rows().items():
            kinds[kind] = {"asked": entry.total, **{variant: entry.accuracy(variant) for variant in variants}}
            measures = self.metric.measures_of(kind)
            for name, measure in measures.items() if len(measures) > 1 else ():
                kinds[kind][name] = {variant: measure(entry.points[variant], entry.total) for variant in variants}
            if self.pruned:
                kinds[kind]["agreement"] = entry.agreement
                kinds[kind]["visual_reads"] = entry.visual_reads / max(entry.total, 1)
        return {"metric": self.metric.name, "kinds": kinds, "cost": {variant: self.cost[variant].to_dict() for variant in variants}}


class EvaluationError(BadSampleError):
    """A sample that could not be answered. `report`: the scores of the samples before it."""

    def __init__(self, error: BadSampleError, report: EvalReport) -> None:
        super().__init__(error.message, hint=error.hint)
        self.report = report


Answers = Mapping[str, Prediction]  # by variant
Numbered = tuple[int, Sample]
Ask = Callable[["Questions", Sequence[Numbered]], Iterator[tuple[int, Answers | BadSampleError]]]


@dataclass(frozen=True)
class Questions:
    """How samples are asked, greedily: in which `variants`, by which `fit` and `tier`, for answers of at most `max_tokens`."""

    variants: tuple[str, ...] = (UNPRUNED,)
    fit: str = "exact"
    tier: str | None = None
    max_tokens: int = 128

    def ask(self, runtime: Runtime, samples: Iterable[Numbered]) -> Iterator[tuple[int, Answers | BadSampleError]]:
        """Yield the answers to each sample, or why it cannot be asked."""
        for number, sample in samples:
            try:
                yield number, {variant: self._answer(runtime, sample, variant) for variant in self.variants}
            except UsageError as error:
                yield number, sample.error(error)

    def _answer(self, runtime: Runtime, sample: Sample, variant: str) -> Prediction:
        # All images of a sample for a video are the frames of one.
        prune = variant == PRUNED
        tier = self.tier if prune else None
        answer = runtime.generate(sample.image, sample.prompt, prune=prune, fit=self.fit, tier=tier, max_tokens=self.max_tokens)
        return Prediction.of(answer)


def evaluate(
    runtime: Runtime,
    samples: Sequence[Sample],
    *,
    fit: str = "exact",
    tier: str | None = None,
    max_tokens: int = 128,
    metric: Metric = AS_BEFORE,
    predictions: Predictions | None = None,
    unpruned: Mapping[int, Prediction] | None = None,
    progress: Callable[[int], None] = lambda done: None,
    on_bad: OnBadSample | None = None,
    ask: Ask | None = None,
) -> EvalReport:
    """Answer every sample with greedy decoding, pruned (under `tier` if given) and unpruned, and score the answers.

    `max_tokens`: of the longest answer. `predictions`: a file that each answer is added to, and from which those that it has are
    taken. `unpruned`: the answers of the unpruned model by the number of the sample, if they are known; `runtime` then answers only
    as its plan says. `ask`: asks other runtimes of the same plan (`on_cluster`). Raises EvaluationError, which has the scores so
    far, for the first sample whose image or prompt cannot be used; with `on_bad`, such samples are given to it and left out.
    """
    pruned = bool(runtime.plan.cuts) or unpruned is not None
    if tier is not None:
        tier_number(runtime.tiers, tier)  # raises UsageError: no sample is to blame
    variants = (UNPRUNED,) if not pruned else (PRUNED, UNPRUNED) if unpruned is None else (PRUNED,)
    questions = Questions(variants, fit, tier, max_tokens)
    found: dict[int, Answers] = (
        {} if predictions is None else {n: each for n, each in predictions.found.items() if n < len(samples)}
    )
    missing = [(number, sample) for number, sample in enumerate(samples) if number not in found]
    done = len(found)
    for number, answers in questions.ask(runtime, missing) if ask is None else ask(questions, missing):
        if isinstance(answers, BadSampleError):
            if on_bad is None:
                raise EvaluationError(answers, _report(samples, found, pruned, metric))
            on_bad(answers)
        else:
            found[number] = answers if unpruned is None else {**answers, UNPRUNED: unpruned[number]}
            if predictions is not None:
                points = {name: metric.value(metric.score(samples[number], each.text), 1) for name, each in found[number].items()}
                predictions.write(number, samples[number], found[number], points)
        progress(done := done + 1)
    return _report(samples, found, pruned, metric)


def _report(samples: Sequence[Sample], found: Mapping[int, Answers], pruned: bool, metric: Metric) -> EvalReport:
    report = EvalReport(pruned, metric=metric)
    for number in sorted(found):
        report.add(samples[number], found[number])
    return report


def on_cluster(cluster: Cluster, open_runtime: Callable[[], Runtime]) -> Ask:
    """Return what asks samples on a cluster, whose machines open the runtime by a function that can be pickled."""

    def ask(questions: Questions, samples: Sequence[Numbered]) -> Iterator[tuple[int, Answers | BadSampleError]]:
        count = cluster.parts(len(samples))
        parts = [(open_runtime, questions, samples[index::count]) for index in range(count)]
        for answers in cluster.run(_ask_part, parts):
            yield from answers

    return ask


def _ask_part(
    open_runtime: Callable[[], Runtime], questions: Questions, samples: Sequence[Numbered]
) -> list[tuple[int, Answers | BadSampleError]]:
    return list(questions.ask(open_runtime(), samples))  # runs on a machine of the cluster
