"""Render the loaded inputs of a report as one HTML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from edgeprune import __version__
from edgeprune.calibration.data.statistics import GAMMA_BINS, SHARES, Statistics
from edgeprune.calibration.search.pareto import Curve
from edgeprune.io.files import write_text
from edgeprune.plan import Cut, KeepPlan
from edgeprune.report import charts
from edgeprune.report.gather import AnswerSet, ReportInputs, ReportOptions, load_inputs
from edgeprune.report.text import costs, describe_cuts, schedule_of

_SPLIT = ("system prompt", "image", "instruction", "generated text")
_COSTS = {
    "flops": "Each measured plan, over its operations on visual tokens in prefill, of the unpruned model's.",
    "kv": "Each measured plan, over its visual KV cache, of the unpruned model's.",
    "ttft_ms": "Each measured plan, over its predicted time to the first token.",
}
_FAINTEST = 1e-4  # of the largest cost; smaller costs have the same colour


@dataclass(frozen=True)
class Chart:
    """A chart with its heading and a note on how to read it; `svg` is empty if there is nothing to draw."""

    title: str
    note: str
    svg: Markup = field(default=Markup())


def write_report(request: ReportOptions, output: Path) -> list[str]:
    """Write the requested report to `output` and return the names of its sections."""
    material = load_inputs(request)
    sections = sections_of(material)
    write_text(output, render(material, sections))
    return list(sections)


def sections_of(material: ReportInputs) -> dict[str, list[Chart]]:
    """Return the charts of every section that has data. The section "answers" has pictures instead of charts."""
    sections = {"budgets": _budget_charts(material)}
    if material.statistics is not None:
        sections["statistics"] = _statistics_charts(material.statistics)
    if material.curve is not None:
        sections["curve"] = [_curve_chart(material.curve, material.plan)]
    if material.interview is not None:
        sections["answers"] = []
    return sections


def render(material: ReportInputs, sections: dict[str, list[Chart]]) -> str:
    """Return the page as HTML. All external text is escaped."""
    template = files("edgeprune.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    plan, curve = material.plan, material.curve
    return environment.from_string(template).render(
        material=material,
        plan=plan,
        facts=_facts(material),
        costs=[*costs(plan), *_measured(curve, plan)],
        lines=describe_cuts(plan),
        sections=sections,
        front=[] if curve is None else _front_rows(curve, plan),
        version=__version__,
    )


def _facts(material: ReportInputs) -> list[tuple[str, str]]:
    plan, bundle = material.plan, material.bundle
    facts = [("family", plan.family), ("decoder layers", f"{plan.layers}"), ("image", str(plan.geometry))]
    if bundle is not None:
        manifest = bundle.manifest
        size = sum(record.bytes for record in manifest.files.values()) / 1e6
        facts[:0] = [("model", manifest.source.model)]
        facts += [("KV heads", f"{manifest.decoder.kv_heads}"), ("bundle", f"{size:.1f} MB, opset {manifest.lowering.opset}")]
    return facts


def _measured(curve: Curve | None, plan: KeepPlan) -> list[tuple[str, str, str]]:
    # Results of a search for this plan.
    point = None if curve is None else next((point for point in curve.points if point.plan == plan), None)
    if point is None:
        return []
    rows = [
        ("operations on visual tokens", f"{point.flops:.0%}", "in prefill, of the unpruned model's"),
        ("agreement", f"{point.score:.1%}", f"with the unpruned answers, {point.samples} samples"),
    ]
    return rows if point.ttft_ms is None else [*rows, ("time to first token", f"{point.ttft_ms:.1f} ms", "predicted")]


def _budget_charts(material: ReportInputs) -> list[Chart]:
    plan = material.plan
    note = (
        "Pale: the visual tokens that a layer works on while it reads the prompt (prefill). "
        "Strong: those that its KV cache keeps for the answer."
    )
    found = [Chart("Visual tokens per layer", note, charts.budgets(plan))]
    if plan.cache_cuts and material.statistics is not None and "attention" in material.statistics.parts:
        found.append(_coverage_chart(plan, material.statistics))
    if plan.decode is not None:
        found.append(_decode_chart(plan, plan.decode, material.interview))
    return found


def _decode_chart(plan: KeepPlan, cut: Cut, interview: AnswerSet | None) -> Chart:
    title, questions = "What each step of an answer reads", () if interview is None else interview.asked
    measured = [(f"answer {number}", a.decode_shares) for number, a in enumerate(questions, start=1) if a.decode_shares]
    marks = "Share of the visual KV cache. Marks: what the answers below really read. " if measured else ""
    if not plan.follows_attention:
        schedule = schedule_of(cut, max((len(shares) for _, shares in measured), default=0))
        return Chart(title, f"{marks}The schedule is the same for every answer.", charts.decode_shares(schedule, measured))
    live = "The share follows attention: it is chosen anew at every step of every answer."
    if plan.has_classes:
        live = "The mean over the layers: each has a class, which follows its attention to the image after the prompt."
    if not measured:
        return Chart(title, f"{live} Ask a bundle about an image (--image, --prompt) to see what its answers read.")
    return Chart(title, marks + live, charts.decode_shares(None, measured))


def _coverage_chart(plan: KeepPlan, statistics: Statistics) -> Chart:
    answers = max(float(statistics.total("steps")[0]), 1.0)  # samples with at least one decode step
    covered = np.concatenate([statistics.total("coverage") / answers, np.ones((*statistics.sums["coverage"].shape[:2], 1))], axis=2)
    values = np.full(covered.shape[1::-1], np.nan)
    for layer in {cut.layer for cut in plan.cache_cuts}:
        share = plan.tokens_cached(layer) / plan.geometry.tokens
        values[:, layer] = [np.interp(share, [*SHARES, 1.0], head) for head in covered[layer]]
    heads = [f"{head}" for head in range(len(values))]
    heat = charts.HeatMap(values, np.nan_to_num(np.clip(values, 0.0, 1.0)), heads, "KV head", "{:.0%}".format)
    note = (
        "The share of an unpruned answer's attention to the image that falls on the tokens that stay, if each KV head keeps those "
        f"that it ranks highest: {np.nanmin(values):.0%} to {np.nanmax(values):.0%}. Empty: the layer has no cache cut."
    )
    return Chart("Attention that the kept tokens cover", note, charts.heat_map("coverage", "Coverage by layer and KV head", heat))


def _statistics_charts(statistics: Statistics) -> list[Chart]:
    found: list[Chart] = []
    if "attention" in statistics.parts:
        found += _attention_charts(statistics)
    return [*found, _cost_chart(statistics)] if "caches" in statistics.parts else found


def _attention_charts(statistics: Statistics) -> list[Chart]:
    split = statistics.attention_split()
    found = [_attention_chart(statistics)]
    if not np.isnan(split).all():
        note = "How attention divides while the unpruned model answers, a mean over the layers. Fewer answers reach later steps."
        found.append(Chart("Where the answer looks", note, charts.attention_by_step(split.mean(axis=1), _SPLIT)))
    return found


def _attention_chart(statistics: Statistics) -> Chart:
    histogram = statistics.total("gamma")
    share = np.cumsum(histogram, axis=1) / np.maximum(histogram.sum(axis=1, keepdims=True), 1e-12)
    edges = np.arange(GAMMA_BINS + 1) / GAMMA_BINS
    mean = histogram @ (edges[1:] + edges[:-1]) / 2 / np.maximum(histogram.sum(axis=1), 1e-12)
    low, high = (np.array([np.interp(quartile, [0.0, *row], edges) for row in share]) for quartile in (0.25, 0.75))
    note = f"The share of the last prompt token's attention that goes to the image, over {statistics.samples} samples."
    return Chart("Attention to vision", note, charts.attention_by_layer(mean, low, high))


def _cost_chart(statistics: Statistics) -> Chart:
    values = statistics.mean("cache_kl").T
    largest = max(float(values.max()), 1e-12)
    least = np.clip(values.min() / largest, _FAINTEST, 0.5)
    depth = 1.0 - np.log(np.clip(values / largest, least, 1.0)) / np.log(least)
    heat = charts.HeatMap(values, depth, [f"{share:.0%}" for share in SHARES], "share kept", _nats)
    note = (
        "How far an answer's token probabilities move (KL divergence in nats, summed over the answer) if one layer's visual cache "
        f"keeps only a share and all others stay whole: {_nats(float(values.min()))} to {_nats(float(values.max()))}, a mean over "
        f"{statistics.samples} samples. The stronger the colour, the further, on a logarithmic scale."
    )
    return Chart("What a smaller cache costs", note, charts.heat_map("cost", "Cost by layer and share kept", heat))


def _nats(value: float) -> str:
    return "<0.001" if value < 0.0005 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _curve_chart(curve: Curve, plan: KeepPlan) -> Chart:
    note = (
        f"{_COSTS[curve.axis]} How often its answers agree with the unpruned model's stands upwards. Hollow: baselines that a "
        "method must beat. The line joins the best plans at every cost."
    )
    return Chart("Agreement over cost", note, charts.trade_off(curve, plan))


def _front_rows(curve: Curve, plan: KeepPlan) -> list[dict[str, Any]]:
    chosen = None if curve.chosen is None else curve.points[curve.chosen]
    points = curve.front()
    if chosen is not None and chosen not in points:
        points.append(chosen)
    return [
        {
            "name": point.name,
            "flops": f"{point.flops:.1%}",
            "kv": f"{point.kv:.1%}",
            "ttft": "" if point.ttft_ms is None else f"{point.ttft_ms:.1f} ms",
            "score": f"{point.score:.1%}",
            "samples": point.samples,
            "mark": ", ".join(
                label for label, applies in (("chosen", point is chosen), ("this plan", point.plan == plan)) if applies
            ),
        }
        for point in points
    ]
