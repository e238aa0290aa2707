"""Gemma 3 against transformers: pooled views, windows and images across steps, one thing broken at a time, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_gemma3
import torch
from test_family_encoder import error
from tiny_folders import cut
from transformers import Gemma3ForConditionalGeneration

from edgeprune.errors import UnsupportedModelError
from edgeprune.families.base import DecoderParts
from edgeprune.families.gemma3 import Gemma3
from edgeprune.model import LayerCache, PrunedDecoder, Segment, StepOutput
from edgeprune.plan import Cut, Geometry
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime.generation.sequence import span_positions, text_positions

SQUARE = Geometry(112, 112, 14, 2)
WHOLE = unpruned_plan("gemma3", 3, SQUARE)
IMAGE = 456
# Two turns with an image each, and four decode steps after each: 16 visual tokens, and a window of 12.
STEPS = [(5, 16, 7), *[(0, 0, 1)] * 4, (3, 16, 6), *[(0, 0, 1)] * 4]


def built(**changes: Any) -> Any:
    """Return a model of random weights."""
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(tiny_gemma3.config(**changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return built()


@pytest.mark.parametrize(("side", "tokens"), [(112, 16), (84, 9), (112, 64)])
def test_a_view_is_encoded_as_in_transformers(side: int, tokens: int) -> None:
    vision = tiny_gemma3.config().vision_config.to_dict() | {"image_size": side}
    model, pixels = built(vision_config=vision, mm_tokens_per_image=tokens), torch.randn(1, 3, side, side)
    merge = Gemma3.settings(model.config, {})["merge_size"]
    geometry = Geometry(side, side, 14, merge)
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output[0]
        tower: Any = Gemma3(model).vision(geometry)
        assert error(tower(cut(pixels, 14))[0], expected) < 1e-5 and tower.takes == ((side // 14) ** 2, 588)
        tower: Any = Gemma3(model).vision(geometry, signals=True)
        visual, received, keys, features = tower(cut(pixels, 14))
        assert error(tower.projector(features), visual[0]) < 1e-6
    assert error(visual[0], expected) < 1e-5 and keys.shape == (tokens, 8)
    assert received.shape == (tokens,) and received.sum() * merge**2 == pytest.approx(1.0)


def test_patches_in_reading_order_would_be_noticed(model: Any) -> None:
    pixels = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output[0]
        tower: Any = Gemma3(model).vision(SQUARE)
        tower.order = torch.arange(64)
        tower.places = tower.places[tower.order]
        assert error(tower(cut(pixels, 14))[0], expected) > 1e-2


def test_cuts_in_the_encoder_keep_whole_tokens(model: Any) -> None:
    pixels, cuts = torch.randn(1, 3, 112, 112), [Cut("vision", "uniform", 8, layer=1)]
    with torch.no_grad():
        visual, kept = Gemma3(model).vision(SQUARE, cuts=cuts)(cut(pixels, 14))
    assert visual.shape == (1, 8, 48) and kept.equal(kept.sort().values) and len(set(kept.tolist())) == 8


class Replay:
    """A conversation of random tokens, step by step through our decoder, and at once through transformers."""

    def __init__(self, model: Any) -> None:
        self.model, self.parts = model, Gemma3(model).decoder()
        generator = torch.Generator().manual_seed(1)
        self.kinds = [kind for before, visual, after in STEPS for kind in [0] * before + [1] * visual + [0] * after]
        self.embeds = torch.randn(1, len(self.kinds), 48, generator=generator)

    @torch.no_grad()
    def expected(self) -> torch.Tensor:
        """Return the logits [vocabulary] after the last token by transformers."""
        types = torch.tensor([self.kinds])
        logits: torch.Tensor = self.model(inputs_embeds=self.embeds, token_type_ids=types, use_cache=False).logits[0, -1]
        return logits

    @torch.no_grad()
    def ours(self, parts: DecoderParts | None = None, *, as_text: bool = False, axes: int = 2) -> torch.Tensor:
        """Return the same logits by our decoder; `as_text`: visual tokens are in the prefix, as in unpruned conversations."""
        decoder, at = PrunedDecoder(parts or self.parts, WHOLE).eval(), 0
        caches = list(decoder.empty_caches())
        for sizes in STEPS:
            positions = [torch.from_numpy(text_positions(at, sizes[0], 2)), *self._rest(at + sizes[0], *sizes[1:])]
            if axes == 1:
                positions = [torch.stack([rows[0], rows[0]]) for rows in positions]
            rows = torch.split(self.embeds[:, at : at + sum(sizes)], list(sizes), dim=1)
            segments = [Segment(*each) for each in zip(rows, positions, strict=True)]
            if as_text:
                joined = Segment(torch.cat(rows[:2], dim=1), torch.cat(positions[:2], dim=1))
                segments = [joined, Segment(rows[1][:, :0], positions[1][:, :0]), segments[2]]
            output = decoder(*segments, caches)
            ends = segments[0].embeds.shape[1], segments[2].embeds.shape[1]
            caches = [cache.append(new, *ends) for cache, new in zip(caches, output.rows, strict=True)]
            at += sum(sizes)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def _rest(self, start: int, visual: int, after: int) -> list[torch.Tensor]:
        span, end = span_positions(start, SQUARE.layout, 2) if visual else (text_positions(start, 0, 2), start)
        return [torch.from_numpy(span), torch.from_numpy(text_positions(end, after, 2))]


@pytest.fixture(scope="module")
def replay(model: Any) -> Replay:
    return Replay(model)


@pytest.mark.parametrize("as_text", [False, True])
def test_steps_with_caches_equal_one_pass_of_transformers(replay: Replay, as_text: bool) -> None:
    assert error(replay.ours(as_text=as_text), replay.expected()) < 1e-5


def _swapped(parts: DecoderParts) -> DecoderParts:
    def rope(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = parts.rope(positions)
        return cos.roll(16, dims=1), sin.roll(16, dims=1)

    return replace(parts, rope=rope)


BROKEN: dict[str, Callable[[DecoderParts], DecoderParts]] = {
    "no window": lambda parts: replace(parts, windows=()),
    "a window of one token more": lambda parts: replace(parts, windows=(13, 0, 13)),
    "a window of one token less": lambda parts: replace(parts, windows=(11, 0, 11)),
    "a window in the global layer": lambda parts: replace(parts, windows=(12, 12, 12)),
    "the ropes of the other layers": _swapped,
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_noticed(what: str, replay: Replay) -> None:
    assert error(replay.ours(BROKEN[what](replay.parts)), replay.expected()) > 1e-3


def test_an_image_that_does_not_see_itself_is_noticed(replay: Replay) -> None:
    assert error(replay.ours(axes=1), replay.expected()) > 1e-3


BEFORE, VISUAL, AFTER = 5, 16, 2
PROMPT = BEFORE + VISUAL + AFTER


def prefilled(replay: Replay, cut: Cut) -> tuple[PrunedDecoder, StepOutput]:
    """Return a decoder under a plan of one cut, and its output for the first prompt."""
    decoder = PrunedDecoder(replay.parts, WHOLE.with_cuts(cut)).eval()
    rows = torch.split(replay.embeds[:, :PROMPT], [BEFORE, VISUAL, AFTER], dim=1)
    places = text_positions(0, BEFORE, 2), span_positions(BEFORE, SQUARE.layout, 2)[0], text_positions(BEFORE + VISUAL, AFTER, 2)
    with torch.no_grad():
        return decoder, decoder(*map(Segment, rows, map(torch.from_numpy, places)), decoder.empty_caches())


@torch.no_grad()
def last_logits_with(replay: Replay, count: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return transformers' logits after `count` tokens if the last one cannot see `hidden` [heads, count] in the last layer."""

    def hide(layer: Any, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = named["attention_mask"].expand(-1, len(hidden), -1, -1).clone()
        mask[0, :, -1] &= ~hidden
        return given, named | {"attention_mask": mask}

    hook = replay.model.model.language_model.layers[2].self_attn.register_forward_pre_hook(hide, with_kwargs=True)
    types = torch.tensor([replay.kinds[:PROMPT] + [0] * (count - PROMPT)])
    output = replay.model(inputs_embeds=replay.embeds[:, :count], token_type_ids=types, use_cache=False)
    hook.remove()
    logits: torch.Tensor = output.logits[0, -1]
    return logits


def without(kept: torch.Tensor, count: int) -> torch.Tensor:
    """Return for each query head which tokens are gone, [heads, count], given the image indices that each KV head kept."""
    gone = torch.zeros(len(kept), count, dtype=torch.bool)
    gone[:, BEFORE : BEFORE + VISUAL] = True
    return gone.scatter(1, BEFORE + kept, False).repeat_interleave(2, dim=0)


def test_pruned_visual_tokens_keep_their_places(replay: Replay) -> None:
    _, output = prefilled(replay, Cut("layer", "uniform", 8, layer=2))
    stays = torch.cat([torch.arange(BEFORE), BEFORE + output.kept[0], torch.arange(BEFORE + VISUAL, PROMPT)])
    assert output.kv_rows[2].place is not None and output.kv_rows[2].place[:, 0].equal(stays)
    expected = last_logits_with(replay, PROMPT, without(output.kept[0].expand(2, -1), PROMPT))
    assert error(output.logits[0, -1], expected) < 1e-5


@pytest.mark.parametrize("places", ["their own", "those of the other head"])
def test_each_head_sees_its_own_tokens_within_the_window(places: str, replay: Replay) -> None:
    decoder, output = prefilled(replay, Cut("cache", "plphp", 8, layer=2))
    (kept,) = output.kept
    assert kept.shape == (2, 8) and not kept[0].equal(kept[1])
    caches = [cache.append(rows, BEFORE, AFTER) for cache, rows in zip(decoder.empty_caches(), output.rows, strict=True)]
    if places != "their own":
        local = caches[2]
        assert isinstance(local, LayerCache) and local.visual_place is not None
        caches[2] = replace(local, visual_place=local.visual_place.flip(1))
    nothing = Segment(replay.embeds[:, :0], torch.zeros(2, 0, dtype=torch.int64))
    token = Segment(replay.embeds[:, PROMPT : PROMPT + 1], torch.from_numpy(text_positions(PROMPT, 1, 2)))
    with torch.no_grad():
        logits = decoder(nothing, nothing, token, caches).logits[0, -1]
    expected = last_logits_with(replay, PROMPT + 1, without(kept, PROMPT + 1))
    assert (error(logits, expected) < 1e-5) == (places == "their own")


def test_layers_with_the_same_tokens_share_their_places() -> None:
    local = (0, 1, 3, 4, 5)
    plan = unpruned_plan("gemma3", 6, SQUARE)
    assert plan.place_layers(local) == dict.fromkeys(local, 0)
    cuts = Cut("layer", "fastv", 8, layer=1), Cut("cache", "plphp", 8, layer=4)
    assert plan.with_cuts(*cuts).place_layers(local) == {0: 0, 1: 1, 3: 1, 4: 4, 5: 1}


def _text(**changes: Any) -> Any:
    return tiny_gemma3.config(text_config=tiny_gemma3.TEXT | changes).text_config


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"vision_config": SimpleNamespace(model_type="clip_vision_model")}, "'clip_vision_model'"),
        ({"text_config": SimpleNamespace(model_type="gemma2")}, "'gemma2'"),
        ({"text_config": _text(use_bidirectional_attention=True)}, "bidirectional"),
        ({"text_config": _text(rope_parameters={"full_attention": {"rope_type": "dynamic", "factor": 2.0}})}, "'dynamic'"),
        ({"mm_tokens_per_image": 9}, "9 visual tokens"),
        ({"mm_tokens_per_image": 15}, "15 visual tokens"),
    ],
)
def test_twists_are_refused(change: dict[str, Any], what: str) -> None:
    config = tiny_gemma3.config()
    Gemma3.check(config)
    for name, value in change.items():
        object.__setattr__(config, name, value)
    with pytest.raises(UnsupportedModelError, match=what):
        Gemma3.check(config)


def test_images_stand_in_the_text_between_line_breaks(model: Any) -> None:
    text = Gemma3(model).image_text(SQUARE)
    assert (text.placeholder, text.token) == ("<start_of_image>", IMAGE)
    assert text.text == "\n\n<start_of_image><image_soft_token><end_of_image>\n\n"


def test_soft_caps_of_the_configuration_are_not_applied() -> None:
    # transformers' Gemma3ForConditionalGeneration applies neither.
    replay = Replay(built(text_config=tiny_gemma3.TEXT | {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}))
    assert replay.parts.softcap is None and error(replay.ours(), replay.expected()) < 1e-5
