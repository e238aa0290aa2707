"""Describe a plan in text: what each cut does, and the remaining cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from edgeprune.plan import Cut, KeepPlan
from edgeprune.registry import METHODS, summary_of

_MAX_LISTED = 6  # entries of a schedule that one sentence can list
_STEPS_AFTER = 8  # decode steps shown after the last change


@dataclass(frozen=True)
class CutDescription:
    """A cut, or all cache cuts of one method: name, effect, and source of the method."""

    name: str
    text: str
    source: str


def describe_cuts(plan: KeepPlan) -> list[CutDescription]:
    """Describe the plan's cuts in order; the cache cuts of one method share an entry."""
    lines = [
        _describe(str(cut), _describe_pruning(cut, plan), cut) for cut in plan.cuts if cut.site in ("vision", "input", "layer")
    ]
    for method, cuts in groupby(plan.cache_cuts, key=lambda cut: cut.method):
        group = list(cuts)
        lines.append(_describe(f"{method} @ {spans('cache', [cut.layer for cut in group])}", _describe_caches(group), group[0]))
    if plan.decode is not None:
        lines.append(_describe(str(plan.decode), _describe_decode(plan.decode), plan.decode))
    return lines


def spans(word: str, numbers: Sequence[int]) -> str:
    """Return numbers as ranges: "cache 0 to 7, 9"."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return f"{word} {', '.join(f'{run[0]}' if len(run) == 1 else f'{run[0]} to {run[-1]}' for run in runs)}"


def format_counts(counts: Sequence[int]) -> str:
    """Return a count, or the range of different counts."""
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def schedule_of(cut: Cut, least: int) -> list[float]:
    """Return the share that a schedule keeps at each decode step, for at least `least` steps and 8 after its last change."""
    steps, shares = cut.options.get("steps", []), cut.options.get("shares", [])
    kept, share = [], 1.0
    for step in range(max(least, max([0, *steps]) + _STEPS_AFTER)):
        reached = [value for start, value in zip(steps, shares, strict=False) if start <= step]
        now = float(reached[-1]) if reached else 1.0
        share = min(share, now) if cut.options.get("monotone", True) else now
        kept.append(share)
    return kept


def costs(plan: KeepPlan) -> list[tuple[str, str, str]]:
    """Return the plan's costs: name, share of the unpruned cost, and the counts."""
    tokens, layers = plan.geometry.tokens, plan.layers
    alive, stored = sum(map(plan.tokens_at_layer, range(layers))), sum(map(plan.tokens_cached, range(layers)))
    total = tokens * layers
    return [
        ("visual tokens in prefill", f"{alive / total:.0%}", f"{alive / layers:.0f} of {tokens} in a layer, on average"),
        ("visual tokens in the KV cache", f"{stored / total:.0%}", f"{stored / layers:.0f} of {tokens} in a layer, on average"),
    ]


def _describe(name: str, text: str, cut: Cut) -> CutDescription:
    settings = {"seed": cut.seed, **cut.options} if cut.method == "random" else cut.options
    listed = [f"{key} = {_format_value(value)}" for key, value in settings.items() if isinstance(value, (str, bool, int, float))]
    source = summary_of(METHODS[cut.method]) if cut.method in METHODS else ""
    return CutDescription(name, text, f"{source} ({', '.join(listed)})" if listed else source)


def _format_value(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else f"{value}"


def _format_share(count: int, tokens: int) -> str:
    return f"{count} of {tokens} visual tokens ({count / tokens:.0%})"


def _describe_pruning(cut: Cut, plan: KeepPlan) -> str:
    tokens = plan.geometry.tokens
    if cut.site == "vision":
        before = plan.encoding(cut.layer - 1)
        return f"From block {cut.layer} of the vision encoder on, {cut.keep} of {before} go on: {_format_share(cut.keep, tokens)}."
    if cut.site == "input":
        return f"{_format_share(cut.keep, tokens)} enter the decoder."
    before = plan.tokens_at_layer(cut.layer - 1)
    if cut.keep == 0:
        return f"From layer {cut.layer} on there are no visual tokens; {before} were left."
    return f"From layer {cut.layer} on, {cut.keep} of the {before} that were left go on: {_format_share(cut.keep, tokens)}."


def _describe_caches(cuts: Sequence[Cut]) -> str:
    where = spans("layer" if len(cuts) == 1 else "layers", [cut.layer for cut in cuts])
    kept = format_counts([cut.keep for cut in cuts])
    return f"After prefill, the KV cache of {where} keeps {kept} visual tokens. Every KV head chooses its own."


def _describe_decode(cut: Cut) -> str:
    begin = f"While the answer is generated, the visual caches from layer {cut.layer} on are read in part:"
    shares = cut.options.get("shares", [])
    if cut.options.get("form") != "schedule":
        choice = f", one of {len(shares)} shares from {min(shares):.0%} to {max(shares):.0%}" if shares else ""
        return f"{begin} the share follows attention, step by step{choice}. It differs from answer to answer."
    steps = cut.options.get("steps", [])
    if 0 < len(steps) <= _MAX_LISTED:
        listed = ", ".join(f"{share:.0%} from step {step}" for step, share in zip(steps, shares, strict=False))
        return f"{begin} {listed}."
    return f"{begin} by a schedule of {len(steps)} steps, {max(shares, default=1):.0%} to {min(shares, default=1):.0%}."
