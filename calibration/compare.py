"""The `edgeprune compare` command: the unpruned model answers every question once, then every plan of the same cost does.

The cost of a plan is the share of the visual tokens that stay, averaged over the decoder's layers (`allocate.recipes`). One folder
holds results.json, table.md, plans and answers. Answers that it already has are not asked for again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from edgeprune.calibration.allocate.recipes import RESIZE, parts_needed, plan_for_budget
from edgeprune.calibration.cluster import Cluster
from edgeprune.calibration.collect.run import CollectOptions, load_or_collect
from edgeprune.calibration.data.samples import Sample, check_images
from edgeprune.calibration.data.statistics import Statistics
from edgeprune.calibration.evaluation import ALL, EVERY, PRUNED, SHORT, UNPRUNED, EvalReport, evaluate, on_cluster
from edgeprune.calibration.interop.lightcompress import read_plan
from edgeprune.calibration.learn.run import LearnRequest, learn
from edgeprune.calibration.metrics import AS_BEFORE, Metric
from edgeprune.calibration.options import LEARNED, RESULTS, CompareOptions
from edgeprune.calibration.predictions import Prediction, Predictions
from edgeprune.calibration.replay.reference import SHARED, Shared, open_reference, reference_model
from edgeprune.calibration.search.auto import prunable_encoder_blocks
from edgeprune.calibration.search.candidates import ENCODER, encoder_plan
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import PlanError, UsageError
from edgeprune.io.files import write_text
from edgeprune.io.progress import Count, Progress
from edgeprune.plan import Cut, Geometry, KeepPlan, Weights, keep_count
from edgeprune.plan.presets import DEFAULT_LAYER
from edgeprune.registry import METHODS, method_class
from edgeprune.runtime import Runtime

NONE = "none"  # the row of the unpruned model
TABLE, PLANS, ANSWERS, STATISTICS, LEARNING = "table.md", "plans", "answers", "statistics.safetensors", "learning"  # in the folder
_DEPTHS = (1 / 4, 1 / 2, 3 / 4)  # EViT cuts before blocks 3, 6 and 9 of 12
ONE_LAYER = "fastv"  # cuts once, between two layers


@dataclass(frozen=True)
class Entry:
    """One row of a comparison. `share`: the budget, None for a plan file. `plan` is None where `reason` says why there is none."""

    name: str
    method: str
    share: float | None
    plan: KeepPlan | None
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """What an entry scored, and its costs as shares of the unpruned model's.

    `work`: visual tokens in prefill, averaged over the layers. `held`: visual KV cache after prefill. `read`: what decode steps
    read of it, averaged over the steps. `encoder`: visual tokens in the vision encoder, averaged over its blocks.
    """

    entry: Entry
    report: EvalReport
    work: float
    held: float
    read: float
    encoder: float

    @property
    def scores(self) -> dict[str, float]:
        """Each measure by name: of short answers, then those of descriptions; with a metric that was asked for, its own."""
        variant, rows = (PRUNED if self.report.pruned else UNPRUNED), self.report.rows()
        metric = self.report.metric
        whole = rows[ALL if metric is AS_BEFORE else EVERY]
        if metric is not AS_BEFORE:
            return {_named(metric.name, name): of(whole.points[variant], whole.total) for name, of in metric.measures.items()}
        found = {"short answers": whole.accuracy(variant)} if whole.total else {}
        if described := rows.get(SHORT):
            facts = metric.measures_of(SHORT)
            found |= {f"facts: {_named('', name)}": of(described.points[variant], described.total) for name, of in facts.items()}
        return found

    @property
    def agreement(self) -> float | None:
        """The share of answers that equal those of the unpruned model, of which it is None."""
        rows = self.report.rows()
        whole = rows.get(ALL) or rows[EVERY]
        return None if self.entry.name == NONE else (whole if whole.total else rows[SHORT]).agreement

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON data."""
        costs = {"work": self.work, "held": self.held, "read": self.read, "encoder": self.encoder}
        return {
            **_entry_data(self.entry),
            "scores": self.scores,
            "agreement": self.agreement,
            **costs,
            "report": self.report.to_dict(),
        }


def _named(metric: str, measure: str) -> str:
    shown = {"f1": "F1", "accuracy": metric}.get(measure, measure.replace("_", " "))
    return shown if measure == "accuracy" or not metric else f"{metric}: {shown}"


def _entry_data(entry: Entry) -> dict[str, Any]:
    plan = None if entry.plan is None else entry.plan.to_dict()
    return {"name": entry.name, "method": entry.method, "keep": entry.share, "plan": plan, "reason": entry.reason}


def run_compare(
    options: CompareOptions, loaded: LoadedModel, unpruned: KeepPlan, samples: Sequence[Sample], metric: Metric, progress: Progress
) -> tuple[list[Row], list[Entry]]:
    """Return what every plan scored over the samples, the unpruned model first, and the entries that have no plan.

    Raises UsageError for a method or a plan file that does not suit the model, BadSampleError for a sample that cannot be used.
    """
    rows = entries(options, loaded, unpruned, progress)
    weights = loaded.folder.source().weights_sha256
    settings = {"metric": metric.name, "fit": options.fit, "max_tokens": str(options.max_tokens), "device": options.device}
    tower: Any = loaded.family.vision(unpruned.geometry)
    run = {"model": f"model {weights[:16]}", **settings}
    comparison = Comparison(options, loaded, unpruned, samples, metric, run, int(tower.blocks))
    with Cluster(options.ray_address) if options.ray_address else nullcontext() as cluster:
        return comparison.measure(rows, cluster, progress), [entry for entry in rows if entry.plan is None]


def entries(options: CompareOptions, loaded: LoadedModel, unpruned: KeepPlan, progress: Progress) -> list[Entry]:
    """Return the rows of a comparison: the unpruned model, every method at every share, and every plan file.

    A method that was named must have a plan, or UsageError is raised; of the others, a row says why there is none.
    """
    blocks = prunable_encoder_blocks(loaded, unpruned)
    statistics = partial(_statistics, options, loaded, unpruned, progress)
    learned = cache(partial(_learned, options, loaded, unpruned, progress))
    rows = [Entry(NONE, NONE, None, unpruned)]

    def check(plan: KeepPlan) -> None:
        loaded.check_plan(plan)
        if options.fit == "exact" and not _same_aspect(plan.geometry, unpruned.geometry):
            raise PlanError("The smaller image has another aspect, which takes --fit stretch or pad.")

    for method in options.compared:
        make = partial(_plan, unpruned=unpruned, blocks=blocks, statistics=statistics, learned=learned)
        made = [_entry(method, share, partial(make, method, share), check) for share in options.shares]
        if options.methods and all(entry.plan is None for entry in made):
            raise UsageError(f"{method} cannot be compared here: {made[0].reason}", hint="Leave it out of --methods.")
        rows += made
    for path in options.plans:
        plan = read_plan(path, unpruned)
        check(plan)
        rows.append(Entry(path.stem, "+".join(dict.fromkeys(cut.method for cut in plan.cuts)) or NONE, None, plan))
    names = [row.name for row in rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"Two rows would be named {twice}.", hint="Give each method, share and plan file once.")
    return rows


def _same_aspect(one: Geometry, other: Geometry) -> bool:
    return one.height * other.width == one.width * other.height


def _statistics(
    options: CompareOptions, loaded: LoadedModel, unpruned: KeepPlan, progress: Progress, parts: tuple[str, ...]
) -> Statistics:
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / RESULTS).touch()  # the folder is that of a comparison now
    request = CollectOptions(unpruned.geometry, max_tokens=options.max_tokens, fit=options.fit, device=options.device, parts=parts)
    return load_or_collect(loaded, options.learning(), request, options.output / STATISTICS, progress, options.ray_address)


def _learned(options: CompareOptions, loaded: LoadedModel, unpruned: KeepPlan, progress: Progress) -> Weights:
    # In closed form, for the most tokens and the fewest of --keep; the sets for other shares are between.
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / RESULTS).touch()
    samples = options.learning()
    check_images(len({str(sample.image) for sample in samples}), f"The samples of {options.calibrate_on} show")
    keeps = [keep_count(unpruned.geometry.tokens, share) for share in options.shares]
    common = {"seed": 0, "max_tokens": options.max_tokens, "fit": options.fit, "device": options.device}
    request = LearnRequest.of(max(keeps), min(keeps), {}, **common)
    folder = options.output / LEARNING
    return learn(loaded, samples, unpruned, request, folder, progress, kept=folder, gate=False).weights


def _entry(method: str, share: float, make: Callable[[], KeepPlan], check: Callable[[KeepPlan], None]) -> Entry:
    name = f"{re.sub(r'.*:', '', method).lower()}-{100 * share:g}"
    try:
        plan = make()
        check(plan)
    except (PlanError, UsageError) as error:
        return Entry(name, method, share, None, error.message)
    return Entry(name, method, share, plan)


def _plan(
    method: str,
    share: float,
    unpruned: KeepPlan,
    blocks: int,
    statistics: Callable[[tuple[str, ...]], Statistics],
    learned: Callable[[], Weights],
) -> KeepPlan:
    if method == ENCODER:
        places = tuple(sorted({max(1, round(depth * blocks)) for depth in _DEPTHS}))
        if blocks <= max(places):
            raise PlanError(f"{method} cuts inside the vision encoder, and this model's cannot be cut.")
        return encoder_plan(unpruned, method, places, share)
    if method == LEARNED:
        return unpruned.with_cuts(Cut("input", method, keep_count(unpruned.geometry.tokens, share), weights=learned()))
    if method == ONE_LAYER:
        return _one_layer(method, share, unpruned)
    if method in METHODS or method == RESIZE:
        parts = parts_needed(method, {}, share)
        return plan_for_budget(method, share, unpruned, statistics(parts) if parts else None)
    sites = method_class(method).sites
    if "input" in sites:
        return unpruned.with_cuts(Cut("input", method, keep_count(unpruned.geometry.tokens, share)))
    if "layer" in sites:
        return _one_layer(method, share, unpruned)
    raise PlanError(f"{method} acts neither at the input nor between layers.")


def _one_layer(method: str, share: float, unpruned: KeepPlan) -> KeepPlan:
    # Before FastV's layer, or before the last layer above it that reaches the share.
    layer = min(DEFAULT_LAYER, int(share * unpruned.layers - 1e-9))
    ratio = (share * unpruned.layers - layer) / (unpruned.layers - layer)
    if layer < 1 or ratio <= 0:
        raise PlanError(f"{method} cannot reach {share:.0%} of {unpruned.layers} layers: the first sees every token.")
    return unpruned.with_cuts(Cut("layer", method, keep_count(unpruned.geometry.tokens, ratio, method), layer))


@dataclass(frozen=True)
class Comparison:
    """A comparison of a model. `run`: model and settings, which its answers must have. `blocks`: of the vision encoder."""

    options: CompareOptions
    loaded: LoadedModel
    unpruned: KeepPlan
    samples: Sequence[Sample]
    metric: Metric
    run: Mapping[str, str]
    blocks: int
    _shared: Shared = field(init=False, default_factory=partial(Shared, SHARED))

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.options.output

    def measure(self, rows: Sequence[Entry], cluster: Cluster | None, progress: Progress) -> list[Row]:
        """Return what every entry with a plan scored, the unpruned model first. Results are written after each.

        Raises BadSampleError for a sample that cannot be used, and UsageError for answers in the folder that are of another run.
        """
        for name in (PLANS, ANSWERS):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write(rows, [])
        able = [entry for entry in rows if entry.plan is not None]
        counted = progress.count(f"{len(able)} plans, answers", len(able) * len(self.samples))
        found: list[Row] = []
        unpruned: dict[int, Prediction] | None = None
        for number, entry in enumerate(able):
            row, said = self._measured(entry, unpruned, cluster, partial(_count_on, counted, number * len(self.samples)))
            unpruned = unpruned or said
            found.append(row)
            self._write(rows, found)
        return found

    def _measured(
        self, entry: Entry, unpruned: dict[int, Prediction] | None, cluster: Cluster | None, counted: Count
    ) -> tuple[Row, dict[int, Prediction]]:
        # The row of an entry, and its answers by the number of the sample.
        plan, options = entry.plan, self.options
        assert plan is not None
        plan.save(self.folder / PLANS / f"{entry.name}.json")
        run = {**self.run, "plan": json.dumps(plan.to_dict(), sort_keys=True)}
        answers = Predictions(self.folder / ANSWERS / f"{entry.name}.jsonl", run, self.samples)
        open_there = partial(open_reference, self.loaded.folder, plan, options.device)
        report = evaluate(
            Runtime(reference_model(self.loaded, plan, options.device, self._shared)),
            self.samples,
            fit=options.fit,
            max_tokens=options.max_tokens,
            metric=self.metric,
            predictions=answers,
            unpruned=unpruned,
            progress=counted,
            ask=None if cluster is None else on_cluster(cluster, open_there),
        )
        variant = UNPRUNED if unpruned is None else PRUNED
        said = {number: answers.found[number][variant] for number in range(len(self.samples))}
        return self._row(entry, plan, report, said.values()), said

    def _row(self, entry: Entry, plan: KeepPlan, report: EvalReport, said: Iterable[Prediction]) -> Row:
        def share(counts: Iterable[int], parts: int) -> float:
            return sum(counts) / (parts * self.unpruned.geometry.tokens)

        layers, blocks = range(plan.layers), range(self.blocks)
        steps = [(len(each.decode_ms), each.visual_reads) for each in said]
        total = sum(count for count, _ in steps)
        read = sum(count * reads for count, reads in steps) / total if total else 1.0
        smaller = plan.geometry.tokens / self.unpruned.geometry.tokens  # an image, which the receipts take for the whole
        work, held = share(map(plan.tokens_at_layer, layers), plan.layers), share(map(plan.tokens_cached, layers), plan.layers)
        return Row(entry, report, work, held, read * smaller, share(map(plan.encoding, blocks), self.blocks))

    def _write(self, entries: Sequence[Entry], rows: Sequence[Row]) -> None:
        done = {row.entry.name: row.to_dict() for row in rows}
        data = [done.get(entry.name) or _entry_data(entry) for entry in entries]
        whole = {"metric": self.metric.name, "questions": len(self.samples), "rows": data}
        write_text(self.folder / RESULTS, json.dumps(whole, indent=1) + "\n")
        if rows:
            write_text(self.folder / TABLE, markdown(rows))


def _count_on(counted: Count, before: int, done: int) -> None:
    counted(before + done)


def columns(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """Return the columns of a table of rows by title; each cell is a share, or None where there is nothing to say."""
    names = [name for name in rows[0].scores]
    cells: dict[str, list[float | None]] = {name: [row.scores[name] for row in rows] for name in names}
    cells["agreement"] = [row.agreement for row in rows]
    if any(row.encoder < 1 for row in rows):
        cells["vision encoder's work"] = [row.encoder for row in rows]
    cells["visual tokens' prefill work"] = [row.work for row in rows]
    cells["visual KV held"], cells["read"] = [row.held for row in rows], [row.read for row in rows]
    return cells


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    cells = columns(rows)
    lines = ["| plan | " + " | ".join(cells) + " |", "|---" * (len(cells) + 1) + "|"]
    for number, row in enumerate(rows):
        shares = (column[number] for column in cells.values())
        lines.append(f"| {row.entry.name} | " + " | ".join("-" if share is None else f"{share:.1%}" for share in shares) + " |")
    return "\n".join(lines) + "\n"
