"""A plan in words: what each cut does, and what is left to pay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from edgeprune.plan import Cut, KeepPlan
from edgeprune.registry import METHODS, summary_of

_FEW = 6  # entries of a schedule that can be read in a sentence
_AFTER = 8  # decode steps shown after the last change


@dataclass(frozen=True)
class CutDescription:
    """One cut, or the cache cuts of one method: its name, what it does, and where the method comes from."""

    name: str
    text: str
    source: str


def describe_cuts(plan: KeepPlan) -> list[CutDescription]:
    """Return the plan's cuts in words, in its order; the cache cuts of one method are one line."""
    lines = [_line(str(cut), _pruning(cut, plan), cut) for cut in plan.cuts if cut.site in ("vision", "input", "layer")]
    for method, cuts in groupby(plan.cache_cuts, key=lambda cut: cut.method):
        group = list(cuts)
        lines.append(_line(f"{method} @ {spans('cache', [cut.layer for cut in group])}", _caching(group), group[0]))
    if plan.decode is not None:
        lines.append(_line(str(plan.decode), _decoding(plan.decode), plan.decode))
    return lines


def spans(word: str, numbers: Sequence[int]) -> str:
    """Return numbers as ranges: "cache 0 to 7, 9"."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return f"{word} {', '.join(f'{run[0]}' if len(run) == 1 else f'{run[0]} to {run[-1]}' for run in runs)}"


def format_counts(counts: Sequence[int]) -> str:
    """Return a count, or the range of several."""
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def schedule_of(cut: Cut, least: int) -> list[float]:
    """Return the share that a schedule leaves at each decode step: of `least` steps, and of some after its last change."""
    steps, shares = cut.options.get("steps", []), cut.options.get("shares", [])
    kept, share = [], 1.0
    for step in range(max(least, max([0, *steps]) + _AFTER)):
        asked = [value for start, value in zip(steps, shares, strict=False) if start <= step]
        now = float(asked[-1]) if asked else 1.0
        share = min(share, now) if cut.options.get("monotone", True) else now
        kept.append(share)
    return kept


def costs(plan: KeepPlan) -> list[tuple[str, str, str]]:
    """Return what the plan costs: name, share of the unpruned, and the counts behind it."""
    tokens, layers = plan.geometry.tokens, plan.layers
    alive, stored = sum(map(plan.tokens_at_layer, range(layers))), sum(map(plan.tokens_cached, range(layers)))
    whole = tokens * layers
    return [
        ("visual tokens in prefill", f"{alive / whole:.0%}", f"{alive / layers:.0f} of {tokens}, mean over the layers"),
        ("visual KV cache after prefill", f"{stored / whole:.0%}", f"{stored} of {whole} entries a KV head, over the layers"),
    ]


def _line(name: str, text: str, cut: Cut) -> CutDescription:
    settings = {"seed": cut.seed, **cut.options} if cut.method == "random" else cut.options
    shown = [f"{key} = {_value(value)}" for key, value in settings.items() if isinstance(value, (str, bool, int, float))]
    source = summary_of(METHODS[cut.method]) if cut.method in METHODS else ""
    return CutDescription(name, text, f"{source} ({', '.join(shown)})" if shown else source)


def _value(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else f"{value}"


def _of(count: int, tokens: int) -> str:
    return f"{count} of {tokens} visual tokens ({count / tokens:.0%})"


def _pruning(cut: Cut, plan: KeepPlan) -> str:
    tokens = plan.geometry.tokens
    if cut.site == "vision":
        before = plan.encoding(cut.layer - 1)
        return f"From block {cut.layer} of the vision encoder on, {cut.keep} of {before} go on: {_of(cut.keep, tokens)}."
    if cut.site == "input":
        return f"{_of(cut.keep, tokens)} enter the decoder."
    before = plan.tokens_at_layer(cut.layer - 1)
    if cut.keep == 0:
        return f"From layer {cut.layer} on there are no visual tokens; {before} were left."
    return f"From layer {cut.layer} on, {cut.keep} of the {before} that were left go on: {_of(cut.keep, tokens)}."


def _caching(cuts: Sequence[Cut]) -> str:
    where = spans("layer" if len(cuts) == 1 else "layers", [cut.layer for cut in cuts])
    kept = format_counts([cut.keep for cut in cuts])
    return f"After prefill, the KV cache of {where} keeps {kept} visual tokens, every KV head its own, ranked."


def _decoding(cut: Cut) -> str:
    begin = f"While the answer is generated, the visual caches from layer {cut.layer} on are read in part:"
    shares = cut.options.get("shares", [])
    if cut.options.get("form") != "schedule":
        choice = f", one of {len(shares)} shares from {min(shares):.0%} to {max(shares):.0%}" if shares else ""
        return f"{begin} the share follows attention, step by step{choice}. It differs from answer to answer."
    steps = cut.options.get("steps", [])
    if 0 < len(steps) <= _FEW:
        listed = ", ".join(f"{share:.0%} from step {step}" for step, share in zip(steps, shares, strict=False))
        return f"{begin} {listed}."
    return f"{begin} by a schedule of {len(steps)} steps, {max(shares, default=1):.0%} to {min(shares, default=1):.0%}."
