"""The method learned: by hand, against a plain loop over numbers, and weights that do not belong to it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learned_weights import drawn_weights, input_cut

from edgeprune.bundle import Bundle
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import BundleError, PlanError
from edgeprune.export.exporter import export_bundle
from edgeprune.export.verification import verify
from edgeprune.methods.base import InputView
from edgeprune.methods.learned import Learned, position_features, read, write
from edgeprune.plan import Cut, Geometry, KeepPlan, View, Weights
from edgeprune.plan.presets import unpruned_plan

GEOMETRY = Geometry(80, 80, 16, 1)  # 5 x 5
PLAIN = {"weights_sha256": "0" * 64, "keeps": [1, 25], "question": 0.0}


def method(weights: Weights, keep: int = 9) -> Learned:
    return Learned(Cut("input", "learned", keep, weights=weights), GEOMETRY)


def tensors(theta: list[float], metric: list[list[float]]) -> dict[str, torch.Tensor]:
    width, rank = np.shape(metric)
    nothing = {"hidden": torch.zeros(width, 1), "hidden_bias": torch.zeros(1), "out": torch.zeros(1)}
    nothing |= {"mean_word": torch.zeros(width), "words": torch.zeros(width, 1), "asked": torch.zeros(rank, 1)}
    return {"theta": torch.tensor(theta), "metric": torch.tensor(metric), "metric_bias": torch.zeros(rank), **nothing}


def test_by_hand() -> None:
    # Scores are the first numbers, places the angles of the other two. Token 0 scores most. Token 1 has the same place as 0, so its
    # gain is e^1.9 * 0.001. Token 2 is at a right angle: e^0.5 * 1.001 = 1.65; token 3 opposite: e^0 * 2.001. So 3, then 2.
    visual = torch.tensor([[2.0, 1.0, 0.0], [1.9, 3.0, 0.0], [0.5, 0.0, 2.0], [0.0, -1.0, 0.0]])
    weights = write(tensors([1.0, 0.0, 0.0], [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), PLAIN)
    seen = InputView(visual, torch.ones(1, 3))
    assert [method(weights, keep).select(seen, keep).tolist() for keep in (1, 2, 3)] == [[0], [0, 3], [0, 2, 3]]


@pytest.mark.parametrize("keep", [1, 6, 25])
@pytest.mark.parametrize(("question", "position"), [(0.0, 0.0), (2.5, 0.0), (2.5, 0.4)])
def test_against_a_plain_loop(keep: int, question: float, position: float) -> None:
    generator = torch.Generator().manual_seed(5)
    visual, prompt = torch.randn(25, 12, generator=generator), torch.randn(4, 12, generator=generator)
    weights = drawn_weights(12, question=question, seed=2, position=position)
    t = {name: tensor.double().numpy() for name, tensor in read(weights)[1].items()}
    rows, words = visual.double().numpy(), prompt.double().numpy()
    inner = torch.from_numpy(rows @ t["hidden"] + t["hidden_bias"])
    score = rows @ t["theta"] + torch.nn.functional.gelu(inner).numpy() @ t["out"]
    wanted = (words.mean(axis=0) - t["mean_word"]) @ t["words"]
    score += question * np.array([row @ t["metric"] @ t["asked"] @ wanted for row in rows])
    places = rows @ t["metric"] + t["metric_bias"]
    places /= np.linalg.norm(places, axis=1, keepdims=True)
    at = position_features(GEOMETRY).double().numpy()
    alike = (1 - position) * places @ places.T + position * at @ at.T
    chosen = [int(score.argmax())]
    while len(chosen) < keep:
        others = [index for index in range(25) if index not in chosen]
        chosen.append(max(others, key=lambda u: np.exp(score[u]) * (1.001 - max(alike[u, c] for c in chosen))))
    assert method(weights, keep).select(InputView(visual, prompt), keep).tolist() == sorted(chosen)


@pytest.mark.parametrize(("height", "width"), [(12, 12), (27, 27), (9, 40), (64, 64)])
def test_position_features_fall_with_the_distance_in_the_image(height: int, width: int) -> None:
    at = position_features(Geometry(height, width, 1, 1)).double()
    down, right = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    middles = torch.stack([down.flatten(), right.flatten()], dim=1).double()
    apart = torch.cdist(middles, middles)
    error = (at @ at.T - torch.exp(-apart.square() / (2 * 0.1**2))).abs()
    assert float(error.max()) < 0.2 and float(error.mean()) < 0.01
    torch.testing.assert_close(at.norm(dim=1), torch.ones(len(at), dtype=torch.float64), rtol=1e-6, atol=0)


def test_position_features_of_views_are_where_they_lie_in_the_image() -> None:
    # The right half, with a newline after each row, and the whole image in one row of two: 2 * (2 + 1) and 2 tokens.
    tiled = Geometry(40, 40, 10, 1, (View(0, 20, 40, 20, 2, 2, separators=1), View(0, 0, 40, 40, 1, 2)))
    alike = position_features(tiled) @ position_features(tiled).T
    assert int(alike[:6, 6].argmax()) in (0, 3) and float(alike[:6, 6].max()) < 0.2  # the left half is far from all of the tile
    assert alike[7].tolist() == pytest.approx(alike[7][[3, 4, 5, 0, 1, 2, 6, 7]].tolist(), abs=1e-3)  # above and below alike
    assert torch.isfinite(alike).all()


def test_what_looks_the_same_elsewhere_is_something_else() -> None:
    # Tokens 0, 1 and 24 look the same. By looks alone the second one taken is another thing that matters less.
    visual = torch.zeros(25, 3)
    visual[:, 2] = 1.0
    visual[[0, 1, 24]] = torch.tensor([[3.0, 1.0, 0.0], [2.9, 1.0, 0.0], [2.8, 1.0, 0.0]])
    found, seen = tensors([1.0, 0.0, 0.0], [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), InputView(visual, torch.ones(1, 3))
    plain, weights = (write(found, {**PLAIN, "position": position}) for position in (0.0, 0.25))
    assert method(plain, 2).select(seen, 2).tolist()[1] != 24
    assert method(weights, 2).select(seen, 2).tolist() == [0, 24]


def test_positions_are_those_in_the_image_behind_a_cut_in_the_encoder() -> None:
    visual = torch.randn(25, 12, generator=torch.Generator().manual_seed(5))
    kept = torch.tensor([0, 3, 4, 7, 9, 12, 18, 20, 21, 24])
    learned = method(drawn_weights(12, position=0.4), 4)
    places = learned.places(InputView(visual, visual))
    assert torch.equal(learned.places(InputView(visual[kept], visual, kept=kept)), places[kept])


@pytest.mark.parametrize("question", [0.0, 2.5])  # which what tokens gain does not depend on
def test_merging_against_a_plain_loop(question: float) -> None:
    visual, prompt = (torch.randn(n, 12, generator=torch.Generator().manual_seed(n)) for n in (25, 4))
    weights = drawn_weights(12, question=question, seed=2, merge=True)
    merging = Learned(Cut("input", "learned", 6, options={"merge": True, "weigh": True}, weights=weights), GEOMETRY)
    seen = InputView(visual, prompt)
    chosen = merging.select(seen, 6)
    embeds, logs = merging.merge(seen, chosen), merging.log_weights(seen, chosen)

    t = {name: tensor.double() for name, tensor in read(weights)[1].items()}
    rows = visual.double()
    gelu = torch.nn.functional.gelu
    scores = rows @ t["theta"] + gelu(rows @ t["hidden"] + t["hidden_bias"]) @ t["out"]
    places = torch.nn.functional.normalize(rows @ t["metric"] + t["metric_bias"], dim=1)
    nearest = [max(chosen.tolist(), key=lambda c: float(place @ places[c])) for place in places]
    for place, c in enumerate(chosen.tolist()):
        group = [index for index in range(25) if nearest[index] == c]
        mean, weighted = rows[group].mean(dim=0), torch.softmax(scores[group], dim=0) @ rows[group]
        inner = rows[c] @ t["own"] + (mean - rows[c]) @ t["near"] + (weighted - rows[c]) @ t["mattering"] + t["merge_bias"]
        expected = rows[c] + gelu(inner) @ t["added"] + t["added_bias"]
        np.testing.assert_allclose(embeds[place].numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)
        log = float(t["power"]) * np.log(len(group)) + float(gelu(inner) @ t["attended"]) + float(t["attended_bias"])
        assert float(logs[place]) == pytest.approx(log, rel=1e-3, abs=1e-4)


def test_equal_tokens_merge_to_numbers() -> None:
    # All are nearest to the first of the chosen ones; the others have none.
    cut = Cut("input", "learned", 3, options={"merge": True, "weigh": True}, weights=drawn_weights(12, merge=True))
    seen = InputView(torch.ones(25, 12), torch.ones(1, 12))
    chosen = Learned(cut, GEOMETRY).select(seen, 3)
    assert torch.isfinite(Learned(cut, GEOMETRY).merge(seen, chosen)).all()
    assert torch.isfinite(Learned(cut, GEOMETRY).log_weights(seen, chosen)).all()


def test_weights_learned_without_merging_do_not_merge() -> None:
    with pytest.raises(PlanError, match="merges; its weights were learned without") as refused:
        Learned(Cut("input", "learned", 9, options={"merge": True}, weights=drawn_weights(12)), GEOMETRY)
    assert str(refused.value.hint).endswith("--method learned --budget 0.25 -o PLAN --option merge=yes")


def test_fewer_tokens_are_some_of_more() -> None:
    seen = InputView(torch.randn(25, 12, generator=torch.Generator().manual_seed(1)), torch.ones(1, 12))
    sets = [set(method(drawn_weights(12), keep).select(seen, keep).tolist()) for keep in range(1, 26)]
    assert all(fewer < more for fewer, more in pairwise(sets))


def test_a_cut_needs_weights() -> None:
    for weights in (None, Weights("0" * 64)):  # the second of a plan without its file
        with pytest.raises(PlanError, match="has no weights") as refused:
            Learned(Cut("input", "learned", 9, weights=weights), GEOMETRY)
        assert "--method learned --budget 0.25" in str(refused.value.hint)


def test_counts_that_were_not_learned_are_refused() -> None:
    for keep in (3, 10):
        with pytest.raises(PlanError, match=f"keeps {keep} tokens; its weights were learned for 4 to 9"):
            method(drawn_weights(12, (4, 9)), keep)
    with pytest.raises(PlanError, match="were learned for 7\\."):
        method(drawn_weights(12, (7, 7)), 9)


def changed(**parts: Any) -> Weights:
    header, found = read(drawn_weights(12))
    return write({**found, **parts}, header)


def stated(**parts: Any) -> Weights:
    header, found = read(drawn_weights(12))
    return write(found, {**header, **parts})


@pytest.mark.parametrize(
    "weights",
    [
        Weights.of(b""),
        Weights.of(b"\xff" * 100),
        Weights.of((drawn_weights(12).content or b"")[:-4]),
        changed(theta=torch.zeros(11)),
        changed(out=torch.full((3,), float("nan"))),
        changed(extra=torch.zeros(3)),
        stated(keeps=[4]),
        stated(keeps=["1", "9"]),
        stated(question="much"),
        stated(position="near"),
        stated(position=1.0),
        stated(position=-0.1),
        stated(schema_version=2),
    ],
)
def test_what_is_not_its_weights_is_refused(weights: Weights) -> None:
    with pytest.raises(PlanError, match="weights are not"):
        method(weights)


def plan_of(model: LoadedModel, width: int = 48, sha256: str | None = None, **options: Any) -> KeepPlan:
    base = unpruned_plan("qwen2_vl", 3, model.geometry((84, 112)))
    return base.with_cuts(input_cut("learned", 5, width, model=sha256 or model.weights_sha256, **options))


def test_weights_of_another_model_are_refused(tiny: LoadedModel) -> None:
    tiny.check_plan(plan_of(tiny))
    with pytest.raises(PlanError, match="learned from another model than"):
        tiny.check_plan(plan_of(tiny, sha256="1" * 64))
    with pytest.raises(PlanError, match=r"tokens of width 12; those of .* have 48"):
        tiny.check_plan(plan_of(tiny, width=12))


@pytest.mark.parametrize("options", [{}, {"weigh": True, "merge": True}])
def test_a_bundle_has_the_weights_with_their_hash(options: dict[str, Any], tiny: LoadedModel, tmp_path: Path) -> None:
    plan = plan_of(tiny, **options)
    bundle = export_bundle(tiny, plan, tmp_path / "bundle")
    (weights,) = plan.weights
    assert bundle.manifest.files["plan.weights.safetensors"].sha256 == weights.sha256
    assert bundle.plan == plan
    assert all(stage.passed for stage in verify(bundle, tiny))
    file = bundle.path / "plan.weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    with pytest.raises((BundleError, PlanError)):
        Bundle.load(bundle.path)


def test_a_bundle_that_does_not_list_the_weights_is_refused(tiny: LoadedModel, tmp_path: Path) -> None:
    bundle = export_bundle(tiny, plan_of(tiny), tmp_path / "bundle")
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    del manifest["files"]["plan.weights.safetensors"]
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"does not list plan\.weights\.safetensors"):
        Bundle.load(bundle.path)


def test_the_order_of_tokens_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(4)
    visual, order = torch.randn(25, 12, generator=generator), torch.randperm(25, generator=generator)
    one, other = (method(drawn_weights(12)).select(InputView(rows, visual[:1]), 9) for rows in (visual, visual[order]))
    assert sorted(order[other].tolist()) == one.tolist()
    assert replace(Cut("input", "learned", 9, weights=drawn_weights(12)), keep=4).weights == drawn_weights(12)
