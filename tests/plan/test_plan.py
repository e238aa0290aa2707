"""Keep plans: what is valid, and that they survive being written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeprune.errors import PlanError
from edgeprune.plan import Cut, Geometry, KeepPlan, View, Weights, keep_count
from edgeprune.plan.presets import DEFAULT_LAYER, staircase_plan, unpruned_plan

GEOMETRY = Geometry(192, 192, 16, 1)


def plan(*cuts: Cut) -> KeepPlan:
    return KeepPlan("qwen2_vl", 8, GEOMETRY, cuts)


def test_geometry_counts_visual_tokens() -> None:
    assert (GEOMETRY.rows, GEOMETRY.columns, GEOMETRY.tokens) == (12, 12, 144)
    merged = Geometry(84, 112, 14, 2)
    assert (merged.rows, merged.columns, merged.tokens) == (3, 4, 12)


def test_alive_follows_the_cuts() -> None:
    staircase = plan(Cut("input", "random", 100), Cut("layer", "fastv", 72, layer=2), Cut("layer", "fastv", 9, layer=5))
    assert [staircase.tokens_at_layer(layer) for layer in range(8)] == [100, 100, 72, 72, 72, 9, 9, 9]


@pytest.mark.parametrize(
    ("cuts", "words"),
    [
        ((Cut("layer", "fastv", 9, layer=3), Cut("layer", "fastv", 10, layer=4)), "only 9 are left"),
        ((Cut("layer", "fastv", 145, layer=3),), "only 144 are left"),
        ((Cut("layer", "fastv", 9, layer=8),), "beyond the model's 8 layers"),
        ((Cut("layer", "fastv", 9, layer=3), Cut("layer", "fastv", 8, layer=3)), "order of their sites"),
    ],
)
def test_impossible_plans_are_refused(cuts: tuple[Cut, ...], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan(*cuts)


@pytest.mark.parametrize(
    "arguments", [("layer", "fastv", 9, 0), ("input", "random", 9, 2), ("heads", "fastv", 9, 2), ("input", "random", 0, 0)]
)
def test_impossible_cuts_are_refused(arguments: tuple[str, str, int, int]) -> None:
    with pytest.raises(PlanError):
        Cut(*arguments)


def test_every_site_has_its_counts() -> None:
    whole = plan(Cut("input", "random", 100), Cut("layer", "fastv", 50, layer=4), Cut("cache", "plphp", 20, layer=1))
    assert [whole.tokens_cached(layer) for layer in range(8)] == [100, 20, 100, 100, 50, 50, 50, 50]
    assert (whole.tokens_entering_decoder, whole.input, whole.decode) == (100, whole.cuts[0], None)


def test_a_cache_keeps_no_more_than_is_alive() -> None:
    with pytest.raises(PlanError, match="only 50 are left"):
        plan(Cut("layer", "fastv", 50, layer=4), Cut("cache", "plphp", 51, layer=5))
    plan(Cut("layer", "fastv", 50, layer=4), Cut("cache", "plphp", 60, layer=3))


def test_a_decode_cut_needs_ranked_caches() -> None:
    ranked = [Cut("cache", "plphp", 144, layer=layer) for layer in range(2, 8)]
    shrinking = Cut("decode", "dyrate", 9, layer=2)
    plan(*ranked, shrinking)
    with pytest.raises(PlanError, match="layer 5 has none"):
        plan(*ranked[:3], *ranked[4:], shrinking)


def test_cuts_are_put_in_order() -> None:
    early, late = Cut("input", "random", 100), Cut("cache", "plphp", 20, layer=1)
    assert plan(late).with_cuts(Cut("layer", "fastv", 50, layer=4), early).cuts == (early, Cut("layer", "fastv", 50, layer=4), late)


@pytest.mark.parametrize(
    ("options", "words"), [({"rate": 1}, "unknown option 'rate'"), ({"reduce": 3}, "of type str"), ({"sum": True}, "of type float")]
)
def test_options_are_checked(options: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Cut("cache", "plphp", 9, options=options).settings(reduce="mean", sum=1.0)


def test_a_plan_survives_being_written(tmp_path: Path) -> None:
    written = plan(Cut("input", "random", 100, seed=4), Cut("layer", "fastv", 72, layer=2))
    written.save(tmp_path / "plan.json")
    assert KeepPlan.load(tmp_path / "plan.json") == written


def test_the_written_form_is_stable() -> None:
    assert plan(Cut("layer", "fastv", 72, layer=2)).to_dict() == {
        "schema_version": 3,
        "family": "qwen2_vl",
        "layers": 8,
        "geometry": {"height": 192, "width": 192, "patch": 16, "merge": 1, "views": (), "frames": 1, "fps": 0.0},
        "cuts": ({"site": "layer", "method": "fastv", "keep": 72, "layer": 2, "seed": 0, "options": {}, "weights": None},),
    }


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 2, "family": "x"}'])
def test_malformed_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError):
        KeepPlan.load(tmp_path / "plan.json")


def test_the_schema_before_weights_is_read() -> None:
    data = plan(Cut("layer", "fastv", 72, layer=2)).to_dict()
    del data["cuts"][0]["weights"]
    assert KeepPlan.from_dict({**data, "schema_version": 2}) == plan(Cut("layer", "fastv", 72, layer=2))
    with pytest.raises(PlanError, match="schema version is 4, this EdgePrune reads 2 to 3"):
        KeepPlan.from_dict({**data, "schema_version": 4})


def learned(content: bytes = b"numbers") -> KeepPlan:
    return plan(Cut("input", "learned", 36, weights=Weights.of(content)))


def test_weights_lie_beside_the_plan(tmp_path: Path) -> None:
    learned().save(tmp_path / "plan.json")
    assert (tmp_path / "plan.weights.safetensors").read_bytes() == b"numbers"
    again = KeepPlan.load(tmp_path / "plan.json")
    assert again == learned() and again.weights[0].content == b"numbers"
    assert learned(b"others") != learned()


def test_a_plan_without_its_own_weights_is_refused(tmp_path: Path) -> None:
    learned().save(tmp_path / "plan.json")
    (tmp_path / "plan.weights.safetensors").write_bytes(b"others")
    with pytest.raises(PlanError, match=r"is not the file that .* was made with"):
        KeepPlan.load(tmp_path / "plan.json")
    (tmp_path / "plan.weights.safetensors").unlink()
    with pytest.raises(PlanError, match=r"weights of .* are missing"):
        KeepPlan.load(tmp_path / "plan.json")
    from_a_curve = KeepPlan.from_dict(learned().to_dict())
    with pytest.raises(PlanError, match="not at hand"):
        from_a_curve.save(tmp_path / "other.json")


@pytest.mark.parametrize("named", [3, "abc", "A" * 64, ["0" * 64]])
def test_weights_are_named_by_their_sha256(named: object) -> None:
    data = learned().to_dict()
    data["cuts"][0]["weights"] = named
    with pytest.raises(PlanError, match="must be a sha256"):
        KeepPlan.from_dict(data)


def test_only_one_cut_is_learned() -> None:
    with pytest.raises(PlanError, match="different weights"):
        learned().with_cuts(Cut("layer", "learned", 20, layer=2, weights=Weights.of(b"others")))


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    data = plan(Cut("layer", "fastv", 72, layer=2)).to_dict()
    data["cuts"][0]["rate"] = 0.5
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match="rate"):
        KeepPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(("keep", "count"), [(1.0, 144), (0.5, 72), (0.25, 36), (0.1, 14), (0.001, 1), (1 / 3, 48)])
def test_keep_ratios_round_down_to_at_least_one(keep: float, count: int) -> None:
    assert keep_count(144, keep) == count


@pytest.mark.parametrize(
    ("method", "counts"),  # of 576 tokens at 10 %, 57.6, and of 45 at 10 %, 4.5
    [
        *(("fastv", (58, 4)), ("divprune", (58, 4))),  # Python's round: a half goes to the even number
        *(("evit", (58, 5)), ("dart", (58, 5))),
        *(("pyramiddrop", (57, 4)), ("cdpruner", (57, 4)), ("evs", (57, 4)), ("random", (57, 4))),
    ],
)
def test_counts_are_rounded_as_the_authors_do(method: str, counts: tuple[int, int]) -> None:
    assert (keep_count(576, 0.1, method), keep_count(45, 0.1, method)) == counts
    assert keep_count(576, 0.25, method) == 144
    assert keep_count(3, 0.1, method) == 1


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_keep_ratios_outside_are_refused(keep: float) -> None:
    with pytest.raises(PlanError, match=r"outside \(0, 1\]"):
        keep_count(144, keep)


def test_one_ratio_needs_no_layer() -> None:
    cut = staircase_plan(unpruned_plan("qwen2_vl", 8, GEOMETRY), "fastv", [0.25]).cuts[0]
    assert (cut.layer, cut.keep) == (DEFAULT_LAYER, 36)


def test_layer_zero_is_the_input_site() -> None:
    cut = staircase_plan(unpruned_plan("qwen2_vl", 8, GEOMETRY), "uniform", [0.25], [0]).cuts[0]
    assert cut.site == "input"


def test_ratios_and_layers_must_pair_up() -> None:
    with pytest.raises(PlanError, match="one --layer for each --keep"):
        staircase_plan(unpruned_plan("qwen2_vl", 8, GEOMETRY), "fastv", [0.5, 0.25], [2])


def test_vision_cuts_come_first() -> None:
    staircase = plan(Cut("layer", "fastv", 30, layer=2)).with_cuts(
        Cut("input", "divprune", 50), Cut("vision", "evit", 72, layer=20), Cut("vision", "evit", 100, layer=6)
    )
    assert [cut.site for cut in staircase.cuts] == ["vision", "vision", "input", "layer"]
    assert [staircase.encoding(block) for block in (0, 5, 6, 19, 20, 31)] == [144, 144, 100, 100, 72, 72]
    assert (
        staircase.tokens_from_encoder,
        staircase.tokens_entering_decoder,
        staircase.tokens_at_layer(0),
        staircase.tokens_at_layer(2),
    ) == (72, 50, 50, 30)
    assert plan(Cut("vision", "evit", 72, layer=6)).tokens_entering_decoder == 72


def test_nothing_comes_back_after_a_vision_cut() -> None:
    for later in (
        Cut("vision", "evit", 73, 7),
        Cut("input", "divprune", 73),
        Cut("layer", "fastv", 73, 2),
        Cut("cache", "plphp", 73),
    ):
        with pytest.raises(PlanError, match="only 72 are left"):
            plan(Cut("vision", "evit", 72, layer=6), later)


@pytest.mark.parametrize(("keep", "layer"), [(0, 3), (9, 0)])
def test_impossible_vision_cuts_are_refused(keep: int, layer: int) -> None:
    with pytest.raises(PlanError):
        Cut("vision", "evit", keep, layer)


def test_every_view_keeps_its_share() -> None:
    views = tuple(View(0, 0, 80, 80, 5, 5, time=time) for time in range(3))
    base = unpruned_plan("qwen2_vl", 8, Geometry(80, 80, 16, 1, views, frames=3, fps=1.0))
    cut = staircase_plan(base, "evit", [0.5], [4], site="vision").cuts[0]
    assert (cut.site, cut.layer, cut.keep) == ("vision", 4, 39)  # EViT rounds up
