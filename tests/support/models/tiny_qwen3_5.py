"""A tiny random Qwen3.5."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_models import WORDS, model_folder
from tiny_qwen2_vl import TURN, inputs, template
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from edgeprune.tabletop import MODEL_FOLDER

__all__ = ["SIZE", "folder", "inputs"]

SIZE = (96, 160)  # 3 x 5 visual tokens


def folder(path: Path) -> Path:
    """Write the model folder into `path`: attention in 2 of 4 layers, 6 heads on 2 KV heads of 16, 2 key heads."""
    shipped = json.loads((MODEL_FOLDER / "config.json").read_text())
    text = {
        "vocab_size": WORDS,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.5,
        },
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": 48,
        "num_position_embeddings": 25,
    }
    tokens = {name: value for name, value in shipped.items() if name.endswith("_token_id")}
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    model_folder(path, Qwen3_5ForConditionalGeneration, config, SIZE)
    _sharpen(path)
    processor = json.loads((path / "preprocessor_config.json").read_text())
    processor |= {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16, "processor_class": "Qwen3VLProcessor"}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    (path / "chat_template.jinja").write_text(template(TURN), encoding="utf-8")  # no system message of its own
    return path


def _sharpen(path: Path) -> None:
    # As in tiny_qwen3_vl.py. The delta nets' own norms are not small either.
    model = Qwen3_5ForConditionalGeneration.from_pretrained(path)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            if layer.block_type == "full_attention":
                layer.self_attn.q_norm.weight.mul_(10)
                layer.self_attn.k_norm.weight.mul_(10)
            else:
                layer.linear_attn.norm.weight.add_(1)
    model.save_pretrained(path)
