"""A tiny random Qwen3-VL."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_models import WORDS, model_folder
from tiny_qwen2_vl import TURN, inputs, template
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from edgeprune.tabletop import MODEL_FOLDER

__all__ = ["SIZE", "folder", "inputs"]

SIZE = (96, 160)  # 3 x 5 visual tokens


def folder(path: Path) -> Path:
    """Write the model folder into `path`: 3 layers, 6 heads on 2 KV heads of 16, a tower of 4 blocks with 2 planes, tied head."""
    shipped = json.loads((MODEL_FOLDER / "config.json").read_text())
    text = {
        "vocab_size": WORDS,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    }
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": 48,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0, 2],
    }
    tokens = {name: value for name, value in shipped.items() if name.endswith("_token_id")}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    model_folder(path, Qwen3VLForConditionalGeneration, config, SIZE)
    _sharpen(path)
    processor = json.loads((path / "preprocessor_config.json").read_text())
    processor |= {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    (path / "chat_template.jinja").write_text(template(TURN), encoding="utf-8")  # no system message of its own
    return path


def _sharpen(path: Path) -> None:
    # Normalized heads are as long as their norm's weights: random ones give flat attention, and answers that ignore the image.
    model = Qwen3VLForConditionalGeneration.from_pretrained(path)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_norm.weight.mul_(10)
            layer.self_attn.k_norm.weight.mul_(10)
    model.save_pretrained(path)
