"""A tiny random Qwen2.5-VL."""

from __future__ import annotations

from pathlib import Path

from tiny_models import tiny_config
from tiny_qwen2_vl import SIZE, inputs, written
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

__all__ = ["SIZE", "folder", "inputs"]


def folder(path: Path) -> Path:
    """Write the model folder into `path`: a tower of 3 blocks, one of them without windows, which are of 2 x 2 tokens.

    A grid of 3 x 5 tokens has whole windows, and windows cut by the right edge, the bottom edge and the corner.
    """
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": 48,
        "intermediate_size": 40,
        "num_heads": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    return written(path, Qwen2_5_VLForConditionalGeneration, tiny_config(Qwen2_5_VLConfig, vision, {"num_hidden_layers": 2}))
