"""Evaluate a model over samples: accuracy of pruned and unpruned answers, and their agreement."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeprune.calibration.data.samples import BadSampleError, OnBadSample, Sample, Score, score
from edgeprune.errors import UsageError
from edgeprune.plan.tiers import tier_number
from edgeprune.runtime import Answer, Receipt, Runtime

ALL, SHORT = "all short answers", "describe"
PRUNED, UNPRUNED = "pruned", "unpruned"


@dataclass
class KindScore:
    """Totals for one kind of prompt: `points` by variant; `agreed` of `total` pruned answers equal the unpruned ones.

    `visual_reads`: the share of visual KV entries that decode steps read, summed over the pruned answers.
    """

    total: int = 0
    points: dict[str, Score] = field(default_factory=lambda: {PRUNED: Score(), UNPRUNED: Score()})
    agreed: int = 0
    visual_reads: float = 0.0

    def accuracy(self, variant: str) -> float:
        """Return the share of right short answers, or the F1 of the facts of descriptions, of a variant (PRUNED or UNPRUNED)."""
        return self.points[variant].f1

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

    def add(self, receipt: Receipt) -> None:
        """Add the costs of one answer."""
        self.ttft_ms.append(receipt.times.ttft_ms)
        self.ms_per_token += receipt.times.decode_ms
        self.kv_bytes.append(receipt.kv_bytes)
        self.visual_kv.append(receipt.visual_kv_share)

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

    def add(self, sample: Sample, answers: Mapping[str, Answer]) -> None:
        """Score the answers to one sample, by variant."""
        entry = self.kinds.setdefault(sample.kind or "question", KindScore())
        entry.total += 1
        for variant, answer in answers.items():
            entry.points[variant] += score(sample, answer.text)
            self.cost[variant].add(answer.receipt)
        if PRUNED in answers:
            entry.visual_reads += answers[PRUNED].receipt.visual_read_share
            entry.agreed += answers[PRUNED].text == answers[UNPRUNED].text

    def rows(self) -> dict[str, KindScore]:
        """Return the kinds in order of appearance, then the total over short answers, without descriptions, which count facts."""
        total = KindScore()
        for kind, entry in self.kinds.items():
            if kind == SHORT:
                continue
            total.total += entry.total
            total.agreed += entry.agreed
            total.visual_reads += entry.visual_reads
            for variant in (PRUNED, UNPRUNED):
                total.points[variant] += entry.points[variant]
        return {**self.kinds, ALL: total}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON data; descriptions also have the precision and recall of their facts, by variant."""
        variants = (PRUNED, UNPRUNED) if self.pruned else (UNPRUNED,)
        kinds: dict[str, Any] = {}
        for kind, entry in self.rows().items():
            kinds[kind] = {"asked": entry.total, **{variant: entry.accuracy(variant) for variant in variants}}
            if kind == SHORT:
                for measure in ("precision", "recall", "f1"):
                    kinds[kind][measure] = {variant: getattr(entry.points[variant], measure) for variant in variants}
            if self.pruned:
                kinds[kind]["agreement"] = entry.agreement
                kinds[kind]["visual_reads"] = entry.visual_reads / max(entry.total, 1)
        return {"kinds": kinds, "cost": {variant: self.cost[variant].to_dict() for variant in variants}}


class EvaluationError(BadSampleError):
    """A sample that could not be answered. `report`: the scores of the samples before it."""

    def __init__(self, error: BadSampleError, report: EvalReport) -> None:
        super().__init__(error.message, hint=error.hint)
        self.report = report


def evaluate(
    runtime: Runtime,
    samples: Sequence[Sample],
    *,
    fit: str = "exact",
    tier: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
    on_bad: OnBadSample | None = None,
) -> EvalReport:
    """Answer every sample with greedy decoding, pruned (under `tier` if given) and unpruned, and score the answers.

    Raises EvaluationError, which has the scores so far, for the first sample whose image or prompt cannot be used; with `on_bad`,
    such samples are given to it and left out.
    """
    report = EvalReport(pruned=bool(runtime.plan.cuts))
    if tier is not None:
        tier_number(runtime.tiers, tier)  # raises UsageError: no sample is to blame
    for done, sample in enumerate(samples, start=1):
        try:
            report.add(sample, _answers(runtime, sample, report.pruned, fit, tier))
        except UsageError as error:
            bad = sample.error(error)
            if on_bad is None:
                raise EvaluationError(bad, report) from error
            on_bad(bad)
        progress(done)
    return report


def _answers(runtime: Runtime, sample: Sample, pruned: bool, fit: str, tier: str | None) -> dict[str, Answer]:
    # The answers by variant.
    found = {}
    for variant in (PRUNED, UNPRUNED) if pruned else (UNPRUNED,):
        prune = variant == PRUNED
        found[variant] = runtime.generate(sample.image, sample.prompt, prune=prune, fit=fit, tier=tier if prune else None)
    return found
