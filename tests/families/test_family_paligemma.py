"""PaliGemma and PaliGemma 2 against transformers: visual tokens, the prompt's form, who sees whom, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_paligemma
import tiny_paligemma2
import torch
from PIL import Image
from test_family_encoder import error
from test_family_llava import first_logits
from tiny_folders import cut
from transformers import LlamaConfig, PaliGemmaForConditionalGeneration
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor

from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import load_model, resolve_model
from edgeprune.errors import UnsupportedModelError, UsageError
from edgeprune.families.paligemma import PaliGemma
from edgeprune.model import PrunedDecoder, Segment
from edgeprune.plan import Geometry
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime import Runtime
from edgeprune.runtime.backends.compare import RecordingBackend
from edgeprune.runtime.generation.pipeline import SharedState
from edgeprune.runtime.text.prompt import ChatTemplate

SQUARE = Geometry(56, 56, 14, 1)


@pytest.fixture(params=[tiny_paligemma, tiny_paligemma2], ids=["gemma", "gemma2"])
def model(request: pytest.FixtureRequest) -> Any:
    """Return a model of random weights, with Gemma and with Gemma 2."""
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(request.param.config()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def test_a_view_is_encoded_as_in_transformers(model: Any) -> None:
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output[0]
        tower: Any = PaliGemma(model).vision(SQUARE)
        assert error(tower(cut(pixels, 14))[0], expected) < 1e-5 and tower.takes == (16, 588)
        tower: Any = PaliGemma(model).vision(SQUARE, signals=True)
        visual, received, keys, features = tower(cut(pixels, 14))
        assert error(tower.projector(features), visual[0]) < 1e-6
    assert error(visual[0], expected) < 1e-5 and keys.shape == (16, 8)
    assert received.shape == (16,) and received.sum() == pytest.approx(1.0)


def test_a_forgotten_norm_would_be_noticed(model: Any) -> None:
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output[0]
        model.model.vision_tower.post_layernorm.weight.mul_(1.1)
        assert error(PaliGemma(model).vision(SQUARE)(cut(pixels, 14))[0], expected) > 1e-3


def test_visual_tokens_enter_the_decoder_as_they_are_and_text_scaled(model: Any) -> None:
    ids, pixels, entered = torch.tensor([[456] * 16 + [3, 4, 5]]), torch.randn(1, 3, 56, 56), []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda layer, given: entered.append(given[0]))
    parts: Any = PaliGemma(model).decoder()
    with torch.no_grad():
        model(input_ids=ids, pixel_values=pixels, token_type_ids=torch.zeros_like(ids))
        visual, text = PaliGemma(model).vision(SQUARE)(cut(pixels, 14)), parts.embed_tokens(ids[:, 16:])
    assert error(torch.cat([visual, text], dim=1), entered[0]) < 1e-5
    assert error(text, 48**0.5 * parts.embed_tokens.weight.detach()[ids[:, 16:]]) < 1e-6
    heads, windows = (1, ()) if model.config.text_config.model_type == "gemma" else (2, (12, 0))
    assert (parts.heads, parts.kv_heads, parts.head_dim, parts.bidirectional, parts.context) == (4, heads, 16, True, 1024)
    assert parts.windows == windows


def test_the_first_logits_equal_transformers(model: Any) -> None:
    ids, pixels = torch.tensor([[456] * 16 + [3, 4, 5, 6]]), torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        prompt, image = torch.zeros_like(ids), ids.eq(456).long()
        expected, causal = (
            model(input_ids=ids, pixel_values=pixels, token_type_ids=kinds).logits[:, -1] for kinds in (prompt, image)
        )
        actual = first_logits(PaliGemma(model), SQUARE, cut(pixels, 14), ids)
    assert error(actual, expected) < 1e-5 and error(actual, causal) > 1e-2


@pytest.mark.parametrize("model", [tiny_paligemma2], indirect=True)
@pytest.mark.parametrize("broken", ["attention cap", "last cap", "scale", "norm after attention", "norm after the MLP"])
def test_what_gemma_2_adds_is_noticed(broken: str, model: Any) -> None:
    ids, pixels = torch.tensor([[456] * 16 + [3, 4, 5, 6]]), torch.randn(1, 3, 56, 56)
    layer, config = model.model.language_model.layers[0], model.config.text_config
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels, token_type_ids=torch.zeros_like(ids)).logits[:, -1]
        if broken == "attention cap":
            config.attn_logit_softcapping = None
        elif broken == "last cap":
            config.final_logit_softcapping = None
        elif broken == "scale":
            layer.self_attn.scaling = 16**-0.5
        else:
            norm = layer.post_attention_layernorm if broken.endswith("attention") else layer.post_feedforward_layernorm
            norm.weight.add_(0.3)
        assert error(first_logits(PaliGemma(model), SQUARE, cut(pixels, 14), ids), expected) > 1e-3


@pytest.mark.parametrize("typed", [True, False])
def test_the_oracle_lets_the_prompt_see_all_of_itself(model: Any, typed: bool) -> None:
    # Only where it is told so: zeros are the prompt, which generated tokens are no part of.
    ids, pixels, masks = torch.tensor([[456] * 16 + [3, 4, 5]]), torch.randn(1, 3, 56, 56), []
    model.model.language_model.set_attn_implementation("eager")
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_hook(lambda layer, given, made: masks.append(made[1][0].gt(0).all(dim=0)))
    kinds = {"token_type_ids": torch.zeros_like(ids)} if typed else {}
    model.generation_config.eos_token_id = None
    model.generate(ids, pixel_values=pixels, **kinds, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    window = model.config.text_config.to_dict().get("sliding_window", 99)  # of the first layer of Gemma 2, in answers only
    causal = torch.ones(19, 19, dtype=torch.bool).tril()
    for mask, seen in zip(masks, (window, 99), strict=False):
        assert mask.equal(torch.ones_like(causal) if typed else causal.triu(1 - seen))
    ends = [min(20, window), 20, min(21, window), 21]
    assert [(tuple(mask.shape), bool(mask.all())) for mask in masks[2:]] == [((1, end), True) for end in ends]


def test_an_answer_that_is_replayed_at_once_stays_causal(model: Any) -> None:
    parts = PaliGemma(model).decoder()
    decoder = PrunedDecoder(parts, unpruned_plan("paligemma", 2, SQUARE)).eval()
    generator = torch.Generator().manual_seed(0)
    rows = torch.split(torch.randn(1, 25, 48, generator=generator), [0, 16, 4, 5], dim=1)
    places = torch.split(torch.arange(25)[None], [0, 16, 4, 5], dim=1)
    prefix, visual, suffix, answer = map(Segment, rows, places)
    with torch.no_grad():
        prompt = decoder(prefix, visual, suffix, decoder.empty_caches())
        caches = [cache.append(new, 0, 4) for cache, new in zip(decoder.empty_caches(), prompt.rows, strict=True)]
        replayed = decoder(prefix, prefix, answer, caches, every_logit=True).logits[0]
        for step in range(5):
            token = Segment(answer.embeds[:, step : step + 1], answer.positions[:, step : step + 1])
            output = decoder(prefix, prefix, token, caches)
            caches = [cache.append(new, 0, 1) for cache, new in zip(caches, output.rows, strict=True)]
            assert error(replayed[step], output.logits[0, -1]) < 1e-5


def test_the_prompt_is_that_of_transformers() -> None:
    processor = object.__new__(PaliGemmaProcessor)
    processor.tokenizer = SimpleNamespace(bos_token="<bos>")
    _, expected, *_ = processor.prepare_inputs_layout(images=[Image.new("RGB", (56, 56))], text=["<image>caption en"])
    parts = [{"type": "image"}, {"type": "text", "text": "caption "}, {"type": "text", "text": "en"}]
    template = ChatTemplate(str(PaliGemma.chat_template))
    made = template.render([{"role": "user", "content": parts}], add_generation_prompt=True, bos_token="<bos>")
    assert [made] == expected == ["<image><bos>caption en\n"]


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([{"role": "user", "content": "caption en"}], "one image"),
        ([{"role": "user", "content": [{"type": "image"}] * 2}], "one image"),
        ([{"role": "system", "content": "Be brief."}], "no conversation"),
        ([{"role": "user", "content": [{"type": "image"}]}] * 2, "no conversation"),
    ],
)
def test_it_holds_no_conversation(messages: list[Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        ChatTemplate(str(PaliGemma.chat_template)).render(messages, add_generation_prompt=True, bos_token="<bos>")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"text_config": LlamaConfig()}, "'llama'"),
        ({"vision_config": SimpleNamespace(model_type="clip_vision_model")}, "'clip_vision_model'"),
    ],
)
def test_twists_are_refused(change: dict[str, Any], what: str) -> None:
    config = tiny_paligemma.config()
    PaliGemma.check(config)
    for name, value in change.items():
        object.__setattr__(config, name, value)
    with pytest.raises(UnsupportedModelError, match=what):
        PaliGemma.check(config)


def test_images_stand_in_the_text_as_one_token(model: Any) -> None:
    text = PaliGemma(model).image_text(SQUARE)
    assert (text.kind, text.placeholder, text.text, text.token) == ("image", "<image>", "<image>", 456)
    assert PaliGemma.settings(model.config, {"resample": 3}, (28, 28)) == {"resample": 3, "patch_size": 14}


def test_an_image_is_not_recalled_with_what_the_question_before_made_of_it(tmp_path: Path) -> None:
    loaded = load_model(resolve_model(str(tiny_paligemma.folder(tmp_path))))
    plan = unpruned_plan("paligemma", len(loaded.family.decoder().layers), loaded.geometry(tiny_paligemma.SIZE))
    recorder = RecordingBackend(reference_model(loaded, plan).backend)
    pipeline = replace(reference_model(loaded, plan), backend=recorder)
    image, logits = Image.new("RGB", tiny_paligemma.SIZE[::-1], "red"), []
    for cache_bytes in (1 << 24, 0):
        runtime = Runtime(replace(pipeline, state=SharedState(cache_bytes)))
        for prompt in ("What colour is the cube?", "And the ball?"):
            reused = runtime.generate(image, prompt, max_tokens=1).receipt.reused
        logits.append(recorder.steps[-1].logits)
        assert reused == (("vision",) if cache_bytes else ())
    after, alone = logits
    np.testing.assert_array_equal(after, alone)
