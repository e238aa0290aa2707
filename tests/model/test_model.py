"""The pruned decoder against transformers: equal without cuts, equal to masking the dropped tokens with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eager import Prompt, attentions_of, grown, run

from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.model import PrunedDecoder, Segment
from edgeprune.plan import KeepPlan
from edgeprune.plan.presets import unpruned_plan

LOGITS = 1e-4  # absolute, against transformers in float32


@pytest.fixture(scope="module")
def tabletop() -> LoadedModel:
    return load_model(resolve_model("tabletop"))


def without_cuts(plan: KeepPlan) -> KeepPlan:
    return unpruned_plan(plan.family, plan.layers, plan.geometry)


@pytest.mark.parametrize("which", ["tiny", "tabletop"])
def test_unpruned_logits_equal_transformers(which: str, request: pytest.FixtureRequest) -> None:
    loaded: LoadedModel = request.getfixturevalue(which)
    layers = len(loaded.family.decoder().layers)
    size = (84, 112) if which == "tiny" else None
    plan = unpruned_plan("qwen2_vl", layers, loaded.geometry(size))
    prompt = Prompt.make(loaded, plan)
    with torch.no_grad():
        expected = loaded.model(**prompt.inputs).logits[:, -1:]
    assert torch.allclose(run(loaded, plan, prompt).logits, expected, atol=LOGITS, rtol=0)


def test_the_parity_check_can_fail(tiny: LoadedModel, tiny_plan: KeepPlan) -> None:
    plan = without_cuts(tiny_plan)
    prompt = Prompt.make(tiny, plan)
    with torch.no_grad():
        expected = tiny.model(**prompt.inputs).logits[:, -1:]
        weight = tiny.family.decoder().layers[1].self_attn.k_proj.bias
        weight[0] += 0.5
        try:
            broken = run(tiny, plan, prompt).logits
        finally:
            weight[0] -= 0.5
    assert not torch.allclose(broken, expected, atol=LOGITS, rtol=0)


def test_fastv_keeps_what_transformers_attends_to(tiny: LoadedModel, tiny_plan: KeepPlan) -> None:
    prompt = Prompt.make(tiny, tiny_plan)
    attentions = attentions_of(tiny, prompt)
    cut = tiny_plan.cuts[0]
    row = attentions[cut.layer - 1][0, :, -1, prompt.before : prompt.before + prompt.tokens].mean(dim=0)
    expected = row.topk(cut.keep).indices.sort().values
    assert torch.equal(run(tiny, tiny_plan, prompt).kept[0], expected)


def test_dropping_tokens_equals_masking_them(tiny: LoadedModel, tiny_plan: KeepPlan) -> None:
    prompt = Prompt.make(tiny, tiny_plan)
    pruned = run(tiny, tiny_plan, prompt)
    expected = _masked_forward(tiny, tiny_plan, prompt, pruned.kept)
    assert torch.allclose(pruned.logits, expected, atol=LOGITS, rtol=0)
    assert not torch.allclose(pruned.logits, run(tiny, without_cuts(tiny_plan), prompt).logits, atol=LOGITS, rtol=0)


def _masked_forward(loaded: LoadedModel, plan: KeepPlan, prompt: Prompt, kept: tuple[torch.Tensor, ...]) -> torch.Tensor:
    # transformers' own layers over the whole sequence; a dropped token is hidden from every later layer's attention.
    text: Any = loaded.model.model.language_model
    segments = prompt.segments(loaded, plan)
    hidden = torch.cat([segment.embeds for segment in segments], dim=1)
    positions = torch.cat([segment.positions for segment in segments], dim=1)[:, None]
    rope = text.rotary_emb(hidden, positions)
    length = hidden.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    at_layer = {cut.layer: indices for cut, indices in zip(plan.cuts, kept, strict=True)}
    with torch.no_grad():
        for index, layer in enumerate(text.layers):
            if index in at_layer:
                dropped = torch.ones(prompt.tokens, dtype=torch.bool)
                dropped[at_layer[index]] = False
                visible[:, prompt.before : prompt.before + prompt.tokens][:, dropped] = False
            mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rope)
        logits: torch.Tensor = loaded.model.lm_head(text.norm(hidden[:, -1:]))
    return logits


def test_caches_shrink_with_the_cuts(tiny: LoadedModel, tiny_plan: KeepPlan) -> None:
    prompt = Prompt.make(tiny, tiny_plan)
    text = prompt.inputs["input_ids"].shape[1] - prompt.tokens
    assert [rows.key.shape[0] - text for rows in run(tiny, tiny_plan, prompt).kv_rows] == [12, 6, 3]


def test_steps_on_caches_equal_one_forward(tiny: LoadedModel, tiny_plan: KeepPlan) -> None:
    plan = without_cuts(tiny_plan)
    prompt = Prompt.make(tiny, plan)
    prefix, visual, suffix = prompt.segments(tiny, plan)
    decoder = PrunedDecoder(tiny.family.decoder(), plan)
    nothing = Segment(suffix.embeds[:, :0], suffix.positions[:, :0])
    with torch.no_grad():
        whole = decoder(prefix, visual, suffix, decoder.empty_caches())
        begin = Segment(suffix.embeds[:, :4], suffix.positions[:, :4])
        step = decoder(prefix, visual, begin, decoder.empty_caches())
        caches = grown(decoder.empty_caches(), step, prefix.embeds.shape[1], 4)
        for index in range(4, suffix.embeds.shape[1]):
            one = Segment(suffix.embeds[:, index : index + 1], suffix.positions[:, index : index + 1])
            step = decoder(nothing, nothing, one, caches)
            caches = grown(caches, step, 0, 1)
    assert torch.allclose(step.logits, whole.logits, atol=LOGITS, rtol=0)


def test_visual_tokens_in_the_prefix_are_never_pruned(tiny: LoadedModel, tiny_plan: KeepPlan) -> None:
    prompt = Prompt.make(tiny, tiny_plan)
    prefix, visual, suffix = prompt.segments(tiny, tiny_plan)
    joined = Segment(torch.cat([prefix.embeds, visual.embeds], dim=1), torch.cat([prefix.positions, visual.positions], dim=1))
    nothing = Segment(suffix.embeds[:, :0], suffix.positions[:, :0])
    decoder = PrunedDecoder(tiny.family.decoder(), tiny_plan)
    with torch.no_grad():
        output = decoder(joined, nothing, suffix, decoder.empty_caches())
    assert torch.allclose(output.logits, run(tiny, without_cuts(tiny_plan), prompt).logits, atol=1e-6, rtol=0)
