"""A tiny random Qwen2-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_models import model_folder, tiny_config
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SIZE = (84, 140)  # 3 x 5 visual tokens

# What the family's own template writes for the messages of these tests: a system message where there is none, and the turns.
SYSTEM = """\
{% if loop.first and message.role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}"""
TURN = """\
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type in ('image', 'video') %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
"""


def folder(path: Path) -> Path:
    """Write the model folder into `path`: 2 layers, 6 heads on 2 KV heads of 8, a tower of 3 blocks."""
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 48, "num_heads": 2}
    return written(path, Qwen2VLForConditionalGeneration, tiny_config(Qwen2VLConfig, vision, {"num_hidden_layers": 2}))


def written(path: Path, kind: Any, config: Any) -> Path:
    """Write a model of random weights and a chat template with a system message."""
    model_folder(path, kind, config, SIZE)
    (path / "chat_template.jinja").write_text(template(SYSTEM + TURN), encoding="utf-8")
    return path


def template(message: str) -> str:
    """Return a chat template whose messages are written by the template `message`."""
    opening = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return "{% for message in messages %}" + message + "{% endfor %}" + opening


def inputs(loaded_folder: Path, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """Return what transformers' image processor makes of images."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(loaded_folder)
    return dict(processor(images=images, return_tensors="pt"))
