"""The untrained TableTop checkpoint: a Qwen2-VL configuration of 2.4 M parameters, its tokenizer, template and processor."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from edgeprune.tabletop.pairs import PAIR_KINDS, ask_both, sample_pair
from edgeprune.tabletop.questions import ask_all
from edgeprune.tabletop.world import COLOURS, DIGITS, LETTERS, SHAPES, SIDE, sample_scene

PATCH = 16
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# ChatML without line breaks: on a model of this size three tokens a question are worth saving.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def train_tokenizer() -> Tokenizer:
    """Return a byte-level BPE in which every word of the TableTop questions is one token."""
    rng = np.random.default_rng(0)
    corpus = ["user", "assistant", *COLOURS, *SHAPES, *LETTERS, *DIGITS, *"01"]
    for _ in range(400):
        corpus += [f"{q.prompt}\n{q.answer}" for q in ask_all(sample_scene(rng), rng)]
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    words_of_pairs: set[str] = set()
    for _ in range(400):
        pair = sample_pair(rng)
        asked = [question for kind in PAIR_KINDS if (question := ask_both(pair, rng, kind))]
        texts = [text for question in asked for text in (question.prompt, question.answer)]
        words_of_pairs.update(match for text in texts for match in re.findall(r" ?[a-z]+", text, re.IGNORECASE))
    return _with_words(tokenizer, sorted(words_of_pairs))


def _with_words(tokenizer: Tokenizer, words: list[str]) -> Tokenizer:
    # Later words come behind the others: the ids of a model that was trained before stay, and so does the split of its texts.
    for word in words:
        pieces = tokenizer.encode(word).tokens
        state = json.loads(tokenizer.to_str())
        vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
        for end in range(1, len(pieces)):
            merged = "".join(pieces[: end + 1])
            merges.append(["".join(pieces[:end]), pieces[end]])
            vocabulary.setdefault(merged, len(vocabulary))
        tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


def save_processor(folder: Path) -> PreTrainedTokenizerFast:
    """Write tokenizer, chat template and image-processor settings; return the tokenizer."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=1,
        temporal_patch_size=2,
        size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    processor.save_pretrained(folder)
    return tokenizer


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLForConditionalGeneration:
    """Return the model with random weights."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 4,
            "embed_dim": 128,
            "hidden_size": 128,
            "num_heads": 4,
            "mlp_ratio": 4,
            "patch_size": PATCH,
            "spatial_merge_size": 1,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.generation_config.do_sample = False
    return model


def adopt_weights(model: Qwen2VLForConditionalGeneration, folder: Path) -> None:
    """Copy the weights of a trained model whose tokenizer lacks the last words; their embeddings stay random."""
    state = model.state_dict()
    for name, trained in Qwen2VLForConditionalGeneration.from_pretrained(folder).state_dict().items():
        state[name][: len(trained)] = trained  # in place: the tensors are the model's
