"""Budgets from statistics: classes and allocators by hand, and every recipe at its cost."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune.calibration.allocate.budgets import (
    ClassRule,
    _knapsack,
    class_rule,
    classify,
    fitprune_plan,
    least_cost_shares,
    plphp_plan,
    vtw_plan,
)
from edgeprune.calibration.allocate.recipes import method_names, plan_for_budget, resized
from edgeprune.calibration.collect.measure import Deletions
from edgeprune.calibration.data.statistics import GAMMA_BINS, SHARES, TOLERANCES, Statistics, StatisticsSource
from edgeprune.calibration.interop.lightcompress_methods import READERS, MethodSettings
from edgeprune.errors import PlanError, UsageError
from edgeprune.methods.base import LayerView
from edgeprune.methods.plphp import PLPHP
from edgeprune.plan import Cut, Geometry, View
from edgeprune.plan.presets import unpruned_plan

GEOMETRY = Geometry(160, 160, 16, 1)  # 10 x 10
LAYERS = 8
BASE = unpruned_plan("qwen2_vl", LAYERS, GEOMETRY)
VIDEO = Geometry(80, 80, 16, 1, tuple(View(0, 0, 80, 80, 5, 5, time=time) for time in range(4)), frames=8, fps=2.0)  # 4 x 5 x 5
BASES = {"evs": unpruned_plan("qwen2_vl", LAYERS, VIDEO)}
SOURCE = StatisticsSource("qwen2_vl", LAYERS, 2, "abc", GEOMETRY, "last", "mean", False)


def statistics(**sums: np.ndarray) -> Statistics:
    values = {name: np.zeros(shape) for name, shape in SOURCE.shapes().items()}
    return Statistics.empty(SOURCE).with_sample({**values, **sums})


def gammas(*samples: list[float]) -> Statistics:
    total = Statistics.empty(SOURCE)
    for sample in samples:
        values = {name: np.zeros(shape) for name, shape in SOURCE.shapes().items()}
        for layer, gamma in enumerate(sample):
            values["gamma"][layer, int(gamma * GAMMA_BINS)] = 1.0
        total = total.with_sample(values)
    return total


def ruled(found: Statistics, share: float | None, **settings: Any) -> ClassRule:
    return class_rule(found, share, settings)


def test_classes_by_hand() -> None:
    # Means .1 .2 ... .8; quartiles at .275 and .625: layers 0, 1 are indifferent, 6, 7 attentive.
    spread = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    found = classify(gammas(spread, spread), ruled(gammas(spread, spread), 0.5, delta=0.2))
    assert [c.name for c in found] == ["indifferent"] * 2 + ["balanced"] * 4 + ["attentive"] * 2
    assert [c.share for c in found] == pytest.approx([0.3] * 2 + [0.5] * 4 + [0.7] * 2)
    assert all(c.stability == 1.0 for c in found)


def test_stability_counts_the_samples_that_agree() -> None:
    spread = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    odd = [0.5, *spread[1:]]  # layer 0 would have been balanced
    found = classify(gammas(spread, spread, spread, odd), ruled(gammas(spread, spread, spread, odd), 0.5, delta=0.2))
    assert found[0].stability == pytest.approx(0.75)
    assert found[3].stability == pytest.approx(1.0)


SPREAD = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]


def test_thresholds_and_rates_may_be_given() -> None:
    rule = ruled(gammas(SPREAD), None, r=0.4, delta=0.1, alpha=0.55, beta=0.15)
    assert [c.name for c in classify(gammas(SPREAD), rule)] == ["indifferent"] + ["balanced"] * 4 + ["attentive"] * 3
    assert rule.shares == pytest.approx((0.3, 0.4, 0.5))
    with pytest.raises(UsageError, match=r"beta 0\.9 is above alpha"):
        ruled(gammas(SPREAD), 0.5, beta=0.9)


def test_the_rate_makes_the_budget_the_mean() -> None:
    many = gammas(SPREAD)
    rule = ruled(many, 0.5, delta=0.2, alpha=0.35, beta=0.15)  # one indifferent, two balanced, five attentive layers
    assert rule.r == pytest.approx(0.4, abs=1e-3)
    assert np.mean([c.share for c in classify(many, rule)]) == pytest.approx(0.5, abs=1e-3)


def test_live_classes_meet_the_budget_over_the_samples() -> None:
    # Half of the samples attend to the image in all layers, by whose own classes every layer of theirs is attentive.
    found = gammas(SPREAD, [0.9] * LAYERS)
    rule = ruled(found, 0.5, delta=0.2, classes="live")
    kept = [rule.shares[kind] for sample in (SPREAD, [0.9] * LAYERS) for kind in rule.kinds(np.asarray(sample))]
    assert np.mean(kept) == pytest.approx(0.5, abs=0.01) and rule.r < 0.5


def test_live_classes_cache_what_an_attentive_layer_keeps() -> None:
    plan = plan_for_budget("plphp", 0.4, BASE, gammas(SPREAD), classes="live", r=0.4, delta=0.2, alpha=0.6, beta=0.3)
    assert [plan.tokens_cached(layer) for layer in range(LAYERS)] == [60] * LAYERS
    assert plan.decode is not None and plan.has_classes and not plan.has_rate_predictor
    assert plan.decode.options == {
        "form": "classes",
        "thresholds": [0.3, 0.6],
        "shares": pytest.approx([1 / 3, 2 / 3, 1], abs=1e-4),
    }
    assert len({plan.cache_group(layer) for layer in range(LAYERS)}) == LAYERS
    PLPHP(plan.decode, GEOMETRY)
    with pytest.raises(PlanError, match="keep nothing"):
        plan_for_budget("plphp", 0.4, BASE, gammas(SPREAD), classes="live", r=0.0, delta=0.0)


def test_an_even_allocation_needs_no_statistics() -> None:
    ranking = {"rows": "last", "reduce": "max", "spread": False}
    measured = plan_for_budget("plphp", 0.37, BASE, gammas(SPREAD), allocate="even")
    alone = plan_for_budget("plphp", 0.37, BASE, allocate="even", ranking=ranking)
    assert [cut.keep for cut in alone.cuts] == [cut.keep for cut in measured.cuts]
    assert alone.cuts[0].options == ranking
    with pytest.raises(UsageError, match="Option 'delta' is of the classes"):
        plan_for_budget("plphp", 0.37, BASE, allocate="even", ranking=ranking, delta=0.1)
    for settings in ({}, {"allocate": "least-cost"}, {"allocate": "even", "prior": True}):
        with pytest.raises(UsageError, match="plphp needs statistics"):
            plan_for_budget("plphp", 0.37, BASE, **settings)


@pytest.mark.parametrize("name", ["classes", "r", "delta", "alpha", "beta"])
def test_an_allocator_without_classes_refuses_their_options(name: str) -> None:
    with pytest.raises(UsageError, match=f"Option '{name}' is of the classes"):
        plan_for_budget("plphp", 0.5, BASE, gammas(SPREAD), allocate="even", **{name: "live" if name == "classes" else 0.5})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "two thresholds and three shares"),
        ({"form": "schedule"}, "form classes"),
        ({"thresholds": [0.1, 0.2], "shares": [0.1, 0.2]}, "three shares"),
        ({"thresholds": [0.1, 0.2], "shares": [0.1, 0.2, 1.2]}, "from 0 to 1"),
        ({"thresholds": [0.1, "x"], "shares": [0.1, 0.2, 0.3]}, "from 0 to 1"),
        ({"thresholds": [0.2, 0.1], "shares": [0.1, 0.2, 0.3]}, "must ascend"),
        ({"thresholds": [0.1, 0.2], "shares": [0.3, 0.2, 0.1]}, "must ascend"),
        ({"rows": "last"}, "unknown option 'rows'"),
    ],
)
def test_a_decode_cut_of_plphp_is_whole(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        PLPHP(Cut("decode", "plphp", 0, options=options), GEOMETRY)


def test_a_plan_keeps_the_shares() -> None:
    plan = plphp_plan(statistics(), BASE, [0.3, 0.5, 1.0, 0.0, 0.25, 0.25, 0.25, 0.25])
    assert [plan.tokens_cached(layer) for layer in range(LAYERS)] == [30, 50, 100, 0, 25, 25, 25, 25]
    assert [plan.tokens_at_layer(layer) for layer in range(LAYERS)] == [100] * LAYERS


def test_the_allocator_spends_where_it_costs() -> None:
    cost = np.zeros((LAYERS, len(SHARES)))
    cost[2] = [5.0, 3.0, 2.0, 1.0, 0.5, 0.2]  # only layer 2 matters
    shares = least_cost_shares(statistics(cache_kl=cost), 0.25)
    assert shares[2] == 1.0
    assert sum(shares) / LAYERS == pytest.approx(0.25, abs=0.01)


def test_the_allocator_is_exact() -> None:
    rng = np.random.default_rng(3)
    costs, budget = np.sort(rng.random((3, 6)), axis=1)[:, ::-1], 7
    best = min((choice for choice in product(range(6), repeat=3) if sum(choice) <= budget), key=lambda c: sum(costs[range(3), c]))
    assert _knapsack(costs, budget) == list(best)


def received(cross: list[float], within: list[float]) -> LayerView:
    """Return a view of tokens that receive this attention from one word, and each from itself alone."""
    text, visual = torch.tensor(cross)[None, None], torch.diag(torch.tensor(within))[None]
    return LayerView(torch.arange(len(cross)), text_attention=lambda: text, visual_attention=lambda: visual)


def test_fitprune_deletes_by_hand() -> None:
    # Layer 0 has sums 1 and 1 / 3 (a mean over queries). At a tolerance of .3 the runs are token 2 (.1) and token 2 (.2): 2 goes.
    # In layer 1 two tokens are left, which are all that is compared with the unpruned sums: 1 (.2 of 1) and 0 (.1 / 2 of .9 / 2).
    deletions = Deletions(0.3, [1.0, 1.0], [1 / 3, 0.45])
    assert deletions(0, received([0.5, 0.4, 0.1], [0.4, 0.4, 0.2])).tolist() == [0, 1]
    assert deletions(1, received([0.8, 0.2], [0.1, 0.8])).tolist() == [0, 1]
    assert Deletions(0.3, [1.0], [0.45])(0, received([0.8, 0.2], [0.8, 0.1])).tolist() == [0]
    assert deletions.counts == [3, 2]


def test_fitprune_stages_keep_the_recipe() -> None:
    recipe = np.zeros((len(TOLERANCES), LAYERS))
    recipe[:] = [100, 90.5, 60, 58.1, 30, 29, 28.8, 10]  # deletions round down: 9, 30, 1, 28, 1, 0, 18
    plan = fitprune_plan(statistics(fitprune=recipe), BASE, 0.6, stages=3)
    assert [(cut.layer, cut.keep) for cut in plan.cuts] == [(2, 60), (4, 31), (7, 13)]


def test_vtw_finds_the_first_harmless_layer_of_its_own() -> None:
    # Layer 3 is harmless, but the authors look at layer 5 and later ones; layer 7 costs more again, which does not count.
    costs = statistics(withdrawn_kl=np.array([9.0, 5.0, 1.0, 0.0, 0.01, 0.0035, 0.0025, 0.5]))
    assert [(cut.layer, cut.keep) for cut in vtw_plan(costs, BASE).cuts] == [(6, 0)]
    assert vtw_plan(costs, BASE, eta=0.004).cuts[0].layer == 5
    assert vtw_plan(costs, BASE, first=1).cuts[0].layer == 3
    with pytest.raises(PlanError, match="every layer from 5 on"):
        vtw_plan(costs, BASE, eta=0.002)


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("share", [0.6, 0.5])
def test_every_recipe_meets_its_cost(name: str, share: float) -> None:
    recipe = np.zeros((len(TOLERANCES), LAYERS))
    recipe[:] = np.linspace(100, 0, len(TOLERANCES))[:, None] * np.linspace(1.0, 0.4, LAYERS)
    gamma = np.eye(GAMMA_BINS)[np.linspace(10, 150, LAYERS).astype(int)]
    settings = {"layer": 2} if name == "evit" else {}
    plan = plan_for_budget(name, share, BASES.get(name, BASE), statistics(fitprune=recipe, gamma=gamma), **settings)
    held = [plan.tokens_cached(layer) if name == "plphp" else plan.tokens_at_layer(layer) for layer in range(LAYERS)]
    spent = sum(held) / (100 * LAYERS)
    whole_steps = {"resize": 0.05, "vtw": 0.07, "fastv": 0.005}  # a grid, a layer and a rounded token cannot be divided further
    assert spent <= share + whole_steps.get(name, 1e-9)
    assert spent >= share - 0.09


def test_sparsevlm_cuts_where_lightcompress_does() -> None:
    # The published table of 192 tokens, from both sides: our own recipe at its cost, and the settings of the other tool.
    base = unpruned_plan("llava", 32, Geometry(384, 384, 16, 1))
    ours = plan_for_budget("sparsevlm", (3 * 576 + 4 * 300 + 9 * 200 + 16 * 110) / (32 * 576), base)
    blocks = {"method": "SparseVLM", "retained_tokens": 192, "merge_flag": False}
    theirs = READERS["SparseVLM"].cuts(MethodSettings("SparseVLM", blocks, 576, 32, 0))
    assert ours.cuts == theirs
    assert [(cut.layer, cut.keep) for cut in theirs] == [(3, 300), (7, 200), (16, 110)]


def test_recipes_that_cannot_be_met_are_refused() -> None:
    for name in ("fastv", "pyramiddrop"):
        with pytest.raises(PlanError, match="cannot reach"):
            plan_for_budget(name, 0.1, BASE)
    with pytest.raises(PlanError, match="needs a video"):
        plan_for_budget("evs", 0.5, BASE)
    with pytest.raises(PlanError, match="first frame whole: 25"):
        plan_for_budget("evs", 0.2, BASES["evs"])
    with pytest.raises(UsageError, match="needs statistics"):
        plan_for_budget("plphp", 0.5, BASE)
    with pytest.raises(PlanError, match="outside"):
        plan_for_budget("random", 0.0, BASE)
    with pytest.raises(UsageError, match="Unknown method"):
        plan_for_budget("magic", 0.5, BASE)


def test_a_smaller_image_keeps_its_aspect() -> None:
    assert resized(Geometry(160, 320, 16, 1), 0.25) == Geometry(80, 160, 16, 1)
    assert plan_for_budget("resize", 0.25, BASE).geometry.tokens == 25


def test_baselines_may_act_on_caches() -> None:
    plan = plan_for_budget("random", 0.3, BASE, site="cache")
    assert [cut.keep for cut in plan.cache_cuts] == [30] * LAYERS


def test_recipes_go_on_from_what_the_encoder_left() -> None:
    base = plan_for_budget("evit", 0.6, BASE, layer=2)
    assert [(cut.site, cut.keep, cut.layer) for cut in base.cuts] == [("vision", 60, 2)]
    assert plan_for_budget("divprune", 0.5, base).tokens_entering_decoder == 30
    assert plan_for_budget("random", 0.5, base, site="cache").tokens_cached(3) == 30
    with pytest.raises(PlanError, match="before a block of the vision encoder"):
        plan_for_budget("evit", 0.6, BASE)
