"""What a search tries first: every method alone, in its variants."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from edgeprune.calibration.budget import Make
from edgeprune.calibration.recipes import INPUT, RESIZE, method_names, plan_at
from edgeprune.calibration.statistics import Statistics
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.presets import encoder_count

BASELINES = ("random", "uniform", RESIZE)
ENCODER = "evit"  # the method that ranks inside the vision encoder
Recipe = tuple[str, Make]  # group, a method or "composed", and how its plans are made
_VARIANTS: dict[str, list[dict[str, Any]]] = {
    "zspaprune": [{"core": 0.0}, {"core": 0.15}, {"core": 0.3}, {"core": 0.5}, {"core": 0.3, "relevance": "max"}],
    "cdpruner": [{"weight": 0.2}, {"weight": 0.5}, {"weight": 0.8}],
    "fastv": [{"layer": 1}, {"layer": 2}, {"layer": 3}],
}
_ENCODER_PARTS = (1 / 3, 1 / 2, 2 / 3)  # of the encoder's blocks, before which tokens may leave


def singles(whole: KeepPlan, statistics: Statistics, blocks: int) -> Iterator[Recipe]:
    """Return every method that leaves fewer tokens to the decoder, alone; inside an encoder of so many `blocks`, 0 for none."""
    for method in method_names():
        if method in (ENCODER, "plphp"):  # the first needs to be told blocks, the second leaves prefill as it is
            continue
        for settings in _VARIANTS.get(method, [{}]):
            yield method, partial(_alone, method, settings, whole, statistics)
    for places in encoder_places(blocks):
        for method in (ENCODER, "uniform"):
            yield method, partial(encoder_plan, whole, method, places)


def _alone(method: str, settings: dict[str, Any], whole: KeepPlan, statistics: Statistics, share: float) -> KeepPlan:
    return plan_at(method, share, whole, statistics, **settings)


def input_cuts() -> list[Cut]:
    """Return a cut of every input method that may stand behind vision cuts, in its variants; what it keeps is of no account."""
    methods = [method for method in INPUT if method not in (*BASELINES, "evs")]
    return [Cut("input", method, 1, options=options) for method in methods for options in _VARIANTS.get(method, [{}])]


def encoder_blocks(blocks: int) -> list[int]:
    """Return the blocks of a vision encoder before which tokens may leave; none where it has too few."""
    return sorted({block for part in _ENCODER_PARTS if 0 < (block := round(blocks * part)) < blocks})


def encoder_places(blocks: int) -> list[tuple[int, ...]]:
    """Return where vision cuts are tried: at one block, or at the first and the last of them."""
    found = encoder_blocks(blocks)
    return [*((block,) for block in found), *([(found[0], found[-1])] if len(found) > 1 else [])]


def encoder_plan(whole: KeepPlan, method: str, places: tuple[int, ...], share: float) -> KeepPlan:
    """Return the plan whose vision cuts leave `share` of the tokens in the end, each cut the same part of those before it."""
    keeps = [encoder_count(whole.geometry, share ** (step / len(places))) for step in range(1, len(places) + 1)]
    return whole.with_cuts(*(Cut("vision", method, keep, block) for keep, block in zip(keeps, places, strict=True)))
