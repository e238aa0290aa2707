"""A tiny PaliGemma 2: PaliGemma's views, and Gemma 2 with tight soft caps, a scale of its own and local layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_paligemma
from tiny_llava import TEXT
from tiny_paligemma import ONE_TURN, SIZE, inputs
from transformers import PaliGemmaConfig

__all__ = ["ONE_TURN", "SIZE", "config", "folder", "inputs"]

GEMMA2 = {
    "model_type": "gemma2",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 25,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 3.0,
    "sliding_window": 12,  # fewer than visual tokens
}


def config(vocabulary: int = 500, image_token: int = 456, **changes: Any) -> PaliGemmaConfig:
    """Return PaliGemma's encoder, and 4 text heads of 16 on 2 KV heads."""
    return tiny_paligemma.config(vocabulary, image_token, **({"text_config": TEXT | GEMMA2 | {"vocab_size": vocabulary}} | changes))


def folder(path: Path) -> Path:
    """Write the model folder and return it."""
    return tiny_paligemma.folder(path, config)
