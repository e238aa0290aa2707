"""The learned ranking of cache entries: by hand, weights that do not belong to it, and the exported graph."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from eager import Prompt, run
from learned_weights import drawn_ranking, drawn_weights
from PIL import Image
from plans import BASE, PROMPT

from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import PlanError
from edgeprune.export.exporter import export_bundle
from edgeprune.export.verification import verify
from edgeprune.methods.base import LayerView
from edgeprune.methods.plphp import PLPHP
from edgeprune.methods.ranking import write
from edgeprune.plan import Cut, Geometry, KeepPlan, Weights
from edgeprune.plan.presets import ranked_plan
from edgeprune.runtime import Runtime, load

GEOMETRY = Geometry(32, 48, 16, 1)  # 6 tokens
OF_NOBODY = {"weights_sha256": "0" * 64}


def cut(weights: Weights | None, layer: int = 0, **options: object) -> Cut:
    return Cut("cache", "plphp", 2, layer, options={"rows": "learned", **options}, weights=weights)


def view(tokens: int = 3) -> LayerView:
    # Two KV heads of one value each, four query heads, two words.
    values = torch.tensor([[[1.0], [0.0]], [[0.0], [2.0]], [[3.0], [1.0]]])[:tokens]
    attention = torch.zeros(4, 2, tokens)
    attention[1, 0, :1] = 0.5  # the second query head of the first KV head looks at token 0
    attention[2, 1, 1:2] = 0.25
    return LayerView(torch.arange(tokens), 2, text_attention=lambda: attention, values=lambda: values)


@pytest.mark.parametrize(("reduce", "seen"), [("max", 0.5), ("mean", 0.25)])
def test_a_score_by_hand(reduce: str, seen: float) -> None:
    # Of the second layer: the first head adds its value, the second subtracts both; only the second looks at the first one's peak.
    weight = torch.tensor([[1.0, -1.0], [0.0, -1.0], [0.0, 10.0], [0.0, 0.0]])
    scores = PLPHP(cut(write(torch.stack([weight * 0, weight]), OF_NOBODY), 1, reduce=reduce), GEOMETRY).score_heads(view())
    floor, peak = math.log(1 / 6), math.log(seen + 1 / 6)
    assert scores[0].tolist() == [1.0, 0.0, 3.0]
    assert scores[1].tolist() == pytest.approx([-1 + 10 * peak, -2 + 10 * floor, -4 + 10 * floor], rel=1e-5)


def test_it_takes_turns_with_other_rankings() -> None:
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])  # tokens 2, 0, 1
    prior = [[1, 0, 2, 3, 4, 5]] * 2
    scores = PLPHP(cut(write(weight[None], OF_NOBODY), prior=prior), GEOMETRY).score_heads(view())
    assert scores.argsort(dim=1, descending=True).tolist() == [[2, 1, 0]] * 2


def test_no_image_breaks_nothing() -> None:
    method = PLPHP(cut(write(torch.ones(1, 4, 2), OF_NOBODY)), GEOMETRY)
    assert method.score_heads(view(0)).shape == (2, 0)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (cut(None), "has no weights"),
        (cut(Weights("0" * 64)), "has no weights"),
        (cut(Weights.of(b"")), "are not readable"),
        (cut(drawn_weights(12)), "are not those of a ranking"),
        (cut(write(torch.ones(4, 2), OF_NOBODY)), "are not those of a ranking"),
        (cut(write(torch.full((1, 4, 2), float("nan")), OF_NOBODY)), "are not those of a method"),
        (cut(write(torch.ones(2, 4, 2), OF_NOBODY), layer=2), "are not those of a ranking of its layer"),
        (cut(write(torch.ones(1, 4, 2), OF_NOBODY), rows="peak"), "its rows = peak does not use"),
    ],
)
def test_what_is_not_its_weights_is_refused(broken: Cut, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        PLPHP(broken, GEOMETRY)


def plan_of(model: LoadedModel, *, head_dim: int | None = None, sha256: str | None = None) -> KeepPlan:
    parts = model.family.decoder()
    weights = drawn_ranking(3, parts.kv_heads, head_dim or parts.head_dim, model=sha256 or model.weights_sha256)
    return ranked_plan(BASE, [4, 5, 12], weights=weights, rows="learned", reduce="max")


def test_weights_of_another_model_are_refused(tiny: LoadedModel) -> None:
    tiny.check_plan(plan_of(tiny))
    with pytest.raises(PlanError, match="learned from another model than") as refused:
        tiny.check_plan(plan_of(tiny, sha256="1" * 64))
    assert "--method plphp --rows learned" in str(refused.value.hint)
    with pytest.raises(PlanError, match=r"of width 2; those of"):
        tiny.check_plan(plan_of(tiny, head_dim=1))


def test_weights_where_none_belong_are_refused(tiny: LoadedModel) -> None:
    plan = BASE.with_cuts(Cut("input", "divprune", 5, weights=drawn_weights(48, model=tiny.weights_sha256)))
    with pytest.raises(PlanError, match="names weights, and what it does has none"):
        tiny.check_plan(plan)


def test_the_bundle_keeps_and_says_the_same(tiny: LoadedModel, tiny_image: Image.Image, tmp_path: Path) -> None:
    plan = plan_of(tiny)
    bundle = export_bundle(tiny, plan, tmp_path / "bundle")
    assert bundle.plan == plan
    assert all(stage.passed for stage in verify(bundle, tiny))
    chats = [runtime.chat() for runtime in (load(bundle.path, threads=1), Runtime(reference_model(tiny, plan)))]
    for question in ((PROMPT, tiny_image), ("And now?",)):  # the second step has no image
        said, expected = ("".join(chat.ask(*question, max_tokens=4)) for chat in chats)
        assert said == expected


def test_it_ranks_by_what_the_layer_has(tiny: LoadedModel) -> None:
    plan = plan_of(tiny)
    prompt = Prompt.make(tiny, plan)
    other = ranked_plan(BASE, [4, 5, 12])
    assert not torch.equal(run(tiny, plan, prompt).kept[0], run(tiny, other, prompt).kept[0])
