"""A tiny ViP-LLaVA: CLIP's features of three layers, 5 x 5 patches, a Llama decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_folders import write_model, write_tokenizer
from tiny_llava import COMBINED, SIZE, TEXT, VISION, inputs, processor
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

__all__ = ["SIZE", "config", "folder", "inputs"]

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '###Human: '}}"
    "{% elif message['role'] == 'assistant' %}{{ '###' + message['role'].title() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '###Assistant:' }}{% endif %}"
)


def config(vocabulary: int = 500, image_token: int = 456, side: int = 70, **changes: Any) -> VipLlavaConfig:
    """Return the heads of a tiny LLaVA, and features out of order, one of them counted from the first layer."""
    sizes = {
        "text_config": TEXT | {"model_type": "llama", "vocab_size": vocabulary},
        "vision_config": VISION | {"model_type": "clip_vision_model", "patch_size": 14, "image_size": side},
        "vision_feature_layers": [-2, -4, 2],
        "image_token_index": image_token,
        "image_seq_length": (side // 14) ** 2,
        "tie_word_embeddings": False,
    }
    return VipLlavaConfig(**(sizes | changes))


def folder(path: Path) -> Path:
    """Write the model folder and return it."""
    tokenizer = write_tokenizer(path, TEMPLATE, "<image>")
    sizes = config(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    return write_model(path, VipLlavaForConditionalGeneration, sizes, processor(), **COMBINED)
