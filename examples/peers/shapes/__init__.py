"""Checkpoints of true shapes and random weights, by name."""

from __future__ import annotations

from shapes.qwen2_vl import TRUE_VISION, Qwen2VL
from shapes.shape import Shape
from shapes.smolvlm import SmolVLM

SHAPES: dict[str, Shape] = {
    "qwen2-vl-0.5b": Qwen2VL(896, 4864, 24, 14, 2, TRUE_VISION, 756),  # over Qwen2-0.5B, which there is none of; 729 visual tokens
    "qwen2-vl-2b": Qwen2VL(1536, 8960, 28, 12, 2, TRUE_VISION, 756),
    "qwen2-vl-2b-small-image": Qwen2VL(1536, 8960, 28, 12, 2, TRUE_VISION, 448),  # 256 visual tokens
    "smolvlm-256m": SmolVLM(576, 1536, 30, 9, 3, 768, 12, 12, 2048),  # 4 x 4 tiles and the whole image: 1088 visual tokens
    "smolvlm-256m-small-image": SmolVLM(576, 1536, 30, 9, 3, 768, 12, 12, 1024),  # 2 x 2 tiles and the whole: 320
    # To try the scripts.
    "tiny": Qwen2VL(256, 512, 16, 4, 2, TRUE_VISION | {"depth": 4, "embed_dim": 128, "num_heads": 2}, 224),
    "tiny-smolvlm": SmolVLM(256, 512, 16, 4, 2, 128, 4, 2, 1024),
}
