"""Every site, alone and composed: the exported bundle keeps and says the same as the eager reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eager import Prompt, attentions_of, grown, run
from PIL import Image
from plans import BASE, PLANS, PROMPT, RANKED

from edgeprune.bundle import PREDICTOR, SELECTOR, Bundle
from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import PlanError
from edgeprune.export.exporter import export_bundle
from edgeprune.export.verification import verify
from edgeprune.methods.plphp import PLPHP
from edgeprune.model import LayerCache, PrunedDecoder
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.plan.presets import ranked_plan
from edgeprune.runtime import Runtime, load

# The others are run on ONNX Runtime and on the simulated device by test_device_runtime.py; `make test-all` has all.
QUICK = ("cache, schedule", "everything", "live classes")
NAMED = [plan if plan in QUICK else pytest.param(plan, marks=pytest.mark.slow) for plan in sorted(PLANS)]


@pytest.fixture(scope="module", params=NAMED)
def bundle(request: pytest.FixtureRequest, tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(tiny, PLANS[request.param], tmp_path_factory.mktemp("sites") / "bundle")


def test_the_bundle_verifies(bundle: Bundle, tiny: LoadedModel) -> None:
    report = verify(bundle, tiny)
    assert all(stage.passed for stage in report), report


def test_the_receipt_accounts_for_every_cut(bundle: Bundle, tiny_image: Image.Image) -> None:
    plan = bundle.plan
    receipt = load(bundle.path, threads=1).generate(tiny_image, PROMPT, max_tokens=6).receipt
    assert [cut.cut for cut in receipt.cuts] == [str(cut) for cut in plan.cuts if cut.site != "decode"]
    assert [cut.after for cut in receipt.cuts] == [cut.keep for cut in plan.cuts if cut.site != "decode"]
    assert receipt.visual_stored == sum(plan.tokens_cached(layer) for layer in range(3))
    for cut in receipt.cuts:
        assert all(len(set(row)) == cut.after and set(row) <= set(range(12)) for row in np.atleast_2d(cut.kept).tolist())


def test_the_rate_shortens_what_is_read(bundle: Bundle, tiny: LoadedModel, tiny_image: Image.Image) -> None:
    if bundle.plan.decode is None:
        pytest.skip("the plan has no decode cut")
    receipts = [
        runtime.generate(tiny_image, PROMPT, max_tokens=8).receipt
        for runtime in (load(bundle.path, threads=1), Runtime(reference_model(tiny, bundle.plan)))
    ]
    assert receipts[0].decode_shares == pytest.approx(receipts[1].decode_shares)
    assert receipts[0].visual_reads == receipts[1].visual_reads
    assert receipts[0].decode_shares == sorted(receipts[0].decode_shares, reverse=True)
    assert min(receipts[0].visual_reads) < receipts[0].visual_stored


def test_graphs_are_there_as_the_plan_needs_them(bundle: Bundle) -> None:
    assert bundle.file(SELECTOR).is_file() == (bundle.plan.input is not None)
    assert bundle.file(PREDICTOR).is_file() == bundle.plan.has_rate_predictor


def test_switching_pruning_off_asks_the_whole_model(bundle: Bundle, tiny: LoadedModel, tiny_image: Image.Image) -> None:
    whole = Runtime(reference_model(tiny, BASE)).generate(tiny_image, PROMPT, max_tokens=8)
    off = load(bundle.path, threads=1).generate(tiny_image, PROMPT, max_tokens=8, prune=False)
    assert off.text == whole.text
    assert off.receipt.visual_read_share == 1.0


def test_a_schedule_is_followed(tiny: LoadedModel, tiny_image: Image.Image) -> None:
    runtime = Runtime(reference_model(tiny, PLANS["cache, schedule"]))
    receipt = runtime.generate(tiny_image, PROMPT, max_tokens=6).receipt
    assert receipt.decode_shares[:5] == [1.0, 0.5, 0.5, 0.25, 0.25]
    # Of 5, 9 and 12 stored tokens, rounded up.
    assert receipt.visual_reads[:5] == [26, 3 + 5 + 6, 3 + 5 + 6, 2 + 3 + 3, 2 + 3 + 3]


def test_the_next_question_has_the_whole_cache_again(tiny: LoadedModel, tiny_image: Image.Image) -> None:
    chat = Runtime(reference_model(tiny, PLANS["cache, schedule"])).chat()
    "".join(chat.ask(PROMPT, tiny_image, max_tokens=6))
    stream = chat.ask("And the ball?", max_tokens=3)
    "".join(stream)
    assert stream.receipt.visual_reads[0] == 26


def test_a_second_image_joins_the_first(tiny: LoadedModel, tiny_image: Image.Image) -> None:
    plan = PLANS["cache, schedule"]
    chat = Runtime(reference_model(tiny, plan)).chat()
    "".join(chat.ask(PROMPT, tiny_image, max_tokens=3))
    second = chat.ask("And here?", tiny_image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), max_tokens=4)
    text = "".join(second)
    assert second.receipt.visual_reads[:2] == [2 * 26, 2 * (3 + 5 + 6)]
    # The same from nothing: both images are read again, and the answer does not change.
    again = Runtime(reference_model(tiny, plan)).chat()
    "".join(again.ask(PROMPT, tiny_image, max_tokens=3))
    again._conversation._reset()
    assert "".join(again.ask("And here?", tiny_image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), max_tokens=4)) == text


def test_cache_cuts_keep_what_each_head_attends_to(tiny: LoadedModel) -> None:
    plan = ranked_plan(BASE, [4, 4, 4])
    prompt = Prompt.make(tiny, plan)
    attentions = attentions_of(tiny, prompt)
    for layer, kept in enumerate(run(tiny, plan, prompt).kept):
        row = attentions[layer][0, :, -1, prompt.before : prompt.before + prompt.tokens]
        expected = row.view(2, 3, -1).mean(dim=1).topk(4).indices
        assert kept.tolist() == expected.tolist()  # in descending order


def test_a_smaller_budget_is_a_prefix(tiny: LoadedModel) -> None:
    prompt = Prompt.make(tiny, BASE)
    large, small = (run(tiny, ranked_plan(BASE, [keep] * 3, **RANKED), prompt) for keep in (9, 4))
    for whole, part in zip(large.kept, small.kept, strict=True):
        assert torch.equal(whole[:, :4], part)
    for longer, shorter in zip(large.kv_rows, small.kv_rows, strict=True):
        assert torch.equal(longer.key[prompt.before :][:4], shorter.key[prompt.before :][:4])


def test_reading_a_prefix_equals_masking_the_rest(tiny: LoadedModel) -> None:
    prompt = Prompt.make(tiny, BASE)
    decoder = PrunedDecoder(tiny.family.decoder(), ranked_plan(BASE))
    prefix, visual, suffix = prompt.segments(tiny, BASE)
    nothing = type(suffix)(suffix.embeds[:, :0], suffix.positions[:, :0])
    one = type(suffix)(suffix.embeds[:, :1], suffix.positions[:, -1:] + 1)
    with torch.no_grad():
        empty = decoder.empty_caches()
        caches = grown(empty, decoder(prefix, visual, suffix, empty), prefix.embeds.shape[1], suffix.embeds.shape[1])
        held = [cache for cache in caches if isinstance(cache, LayerCache)]
        short = [replace(c, visual_key=c.visual_key[:6], visual_value=c.visual_value[:6]) for c in held]
        read = decoder(nothing, nothing, one, short).logits
        hidden = torch.cat([torch.zeros(1, 5), torch.full((1, 7), float("-inf"))], dim=1)
        masked = decoder(nothing, nothing, one, caches, hide=[hidden] * 3).logits
        whole = decoder(nothing, nothing, one, caches).logits
    assert torch.allclose(read, masked, atol=1e-5)
    assert not torch.allclose(read, whole, atol=1e-3)


def test_the_attention_split_adds_up(tiny: LoadedModel) -> None:
    prompt = Prompt.make(tiny, BASE)
    decoder = PrunedDecoder(tiny.family.decoder(), BASE)
    prefix, visual, suffix = prompt.segments(tiny, BASE)
    groups = torch.eye(3)[[0] * prefix.embeds.shape[1] + [1] * suffix.embeds.shape[1]]
    with torch.no_grad():
        output = decoder(prefix, visual, suffix, decoder.empty_caches(), text_groups=groups)
        rows = decoder(prefix, visual, suffix, decoder.empty_caches(), text_groups=groups, every_logit=True)
    assert torch.allclose(output.split.sum(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(rows.split[-1], output.split, atol=1e-5)
    assert (output.split[:, 3] == 0).all()


def test_a_prior_must_list_every_token() -> None:
    grid = Geometry(16, 32, 16, 1)
    PLPHP(Cut("cache", "plphp", 1, options={"prior": [[1, 0]]}), grid)
    with pytest.raises(PlanError, match="every visual token once"):
        PLPHP(Cut("cache", "plphp", 1, options={"prior": [[1, 1]]}), grid)


def test_a_family_without_the_signal_is_named(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny.family), "signals", ())
    with pytest.raises(PlanError, match=r"of qwen2_vl.* needs the signal 'vision attention'"):
        tiny.check_plan(BASE.with_cuts(Cut("input", "visionzip", 5)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"form": "linear"},
        {"form": "schedule", "steps": [0], "shares": []},
        {"form": "schedule", "steps": [0, 1], "shares": [1.5, 0.2]},
    ],
)
def test_a_rate_without_numbers_is_refused(options: dict[str, Any], tiny: LoadedModel) -> None:
    plan: KeepPlan = ranked_plan(BASE).with_cuts(Cut("decode", "dyrate", 0, options=options))
    with pytest.raises(PlanError):
        tiny.check_plan(plan)


def test_folders_are_named_in_errors(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="nowhere"):
        KeepPlan.load(tmp_path / "nowhere.json")
