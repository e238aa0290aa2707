"""What every method answers; the attention-based ones of our own and the baselines, each by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeprune.errors import PlanError
from edgeprune.methods.base import LayerView, keep_best, rank
from edgeprune.methods.fastv import FastV
from edgeprune.methods.plphp import PLPHP, vision_attention_score
from edgeprune.methods.uniform import Uniform, farthest_point_order
from edgeprune.plan import Cut, Geometry, View
from edgeprune.registry import METHODS, method_class

GEOMETRY = Geometry(96, 128, 16, 1)  # 6 x 8
BASELINES = ("random", "uniform")


def view(order: torch.Tensor) -> LayerView:
    rows = torch.softmax(torch.randn(4, 200, generator=torch.Generator().manual_seed(1)), dim=-1)
    return LayerView(order, 2, lambda: rows[:, : len(order)])


def make_cut(method: str, keep: int, seed: int = 0) -> Cut:
    return Cut("layer", method, keep, layer=2, seed=seed)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_says_where_it_acts(name: str) -> None:
    sites = method_class(name).sites
    assert sites and set(sites) <= {"vision", "input", "layer", "cache", "decode"}
    assert hasattr(method_class(name), "score_heads" if "cache" in sites else "rate_predictor" if "decode" in sites else "select")


@pytest.mark.parametrize("name", ["fastv", *BASELINES])
@pytest.mark.parametrize("keep", [1, 7, 48])
def test_exactly_the_budget_is_kept_in_order(name: str, keep: int) -> None:
    kept = method_class(name)(make_cut(name, keep), GEOMETRY).select(view(torch.arange(48)), keep).tolist()
    assert len(kept) == keep
    assert kept == sorted(set(kept))
    assert kept[0] >= 0 and kept[-1] < 48


@pytest.mark.parametrize("name", ["fastv", *BASELINES])
def test_no_image_keeps_nothing_and_breaks_nothing(name: str) -> None:
    method = method_class(name)(make_cut(name, 7), GEOMETRY)
    assert method.select(view(torch.arange(0)), 7).tolist() == []


@pytest.mark.parametrize("name", ["plphp", *BASELINES])
def test_a_cache_without_an_image_keeps_nothing(name: str) -> None:
    method = method_class(name)(Cut("cache", name, 7), GEOMETRY)
    assert rank(method.score_heads(view(torch.arange(0))), 7).shape == (2, 0)


@pytest.mark.parametrize("name", ["fastv", *BASELINES])
def test_the_same_cut_scores_the_same(name: str) -> None:
    scores = [method_class(name)(make_cut(name, 7, seed=5), GEOMETRY).score(view(torch.arange(48))) for _ in range(2)]
    assert torch.equal(*scores)


@pytest.mark.parametrize("name", BASELINES)
def test_later_cuts_keep_a_subset(name: str) -> None:
    method = method_class(name)(make_cut(name, 20), GEOMETRY)
    first = keep_best(method.score(view(torch.arange(48))), 20)
    second = first[keep_best(method.score(view(first)), 8)]
    alone = keep_best(method.score(view(torch.arange(48))), 8)
    assert torch.equal(second, alone)


def test_plphp_by_hand() -> None:
    # Four heads on two KV heads. Means of the first pair: .3, .3, .1; of the second: .1, .2, .35. Maxima: .5, .4, .1 and .2, .2,
    # .6.
    attention = torch.tensor([[0.1, 0.4, 0.1], [0.5, 0.2, 0.1], [0.0, 0.2, 0.6], [0.2, 0.2, 0.1]])
    seen = LayerView(torch.arange(3), 2, lambda: attention)
    mean = PLPHP(Cut("cache", "plphp", 1), GEOMETRY).score_heads(seen)
    assert torch.allclose(mean, torch.tensor([[0.3, 0.3, 0.1], [0.1, 0.2, 0.35]]))
    largest = PLPHP(Cut("cache", "plphp", 1, options={"reduce": "max"}), GEOMETRY).score_heads(seen)
    assert rank(largest, 2).tolist() == [[0, 1], [2, 0]]
    # Every head's share of attention to vision: .6, .8, .8, .5.
    assert vision_attention_score(attention).item() == pytest.approx(0.675)


def test_plphp_refuses_other_reductions() -> None:
    with pytest.raises(PlanError, match="Allowed: one of mean, max"):
        PLPHP(Cut("cache", "plphp", 1, options={"reduce": "sum"}), GEOMETRY)


def test_fastv_by_hand() -> None:
    # Two heads; the means are .15, .35, .05, .25: the best two are tokens 1 and 3.
    attention = torch.tensor([[0.2, 0.1, 0.1, 0.4], [0.1, 0.6, 0.0, 0.1]])
    scores = FastV(make_cut("fastv", 2), GEOMETRY).score(LayerView(torch.arange(4), 1, lambda: attention))
    assert keep_best(scores, 2).tolist() == [1, 3]


def test_random_depends_on_the_seed() -> None:
    kept = [
        keep_best(method_class("random")(make_cut("random", 9, seed), GEOMETRY).score(view(torch.arange(48))), 9) for seed in (0, 1)
    ]
    assert not torch.equal(*kept)


def test_uniform_by_hand() -> None:
    # From the middle of a 3 x 3 grid the four corners are farthest, in reading order; then the sides.
    assert farthest_point_order(3, 3).tolist() == [4, 0, 2, 6, 8, 1, 3, 5, 7]


def test_uniform_spreads_over_both_axes() -> None:
    kept = farthest_point_order(12, 12)[:36]
    assert len(set(kept // 12)) >= 6
    assert len(set(kept % 12)) >= 6


def test_uniform_thins_all_views_alike() -> None:
    frames = Geometry(96, 128, 16, 1, tuple(View(0, 0, 96, 128, 6, 8, time=time) for time in range(3)), frames=3, fps=1.0)
    kept = keep_best(Uniform(make_cut("uniform", 36), frames).score(view(torch.arange(144))), 36)
    assert np.bincount(kept.numpy() // 48).tolist() == [12, 12, 12]


def test_uniform_leaves_no_ties() -> None:
    frames = Geometry(96, 128, 16, 1, tuple(View(0, 0, 96, 128, 6, 8, time=time) for time in range(3)), frames=3, fps=1.0)
    scores = Uniform(make_cut("uniform", 36), frames).score(view(torch.arange(144)))
    assert len(set(scores.tolist())) == 144
