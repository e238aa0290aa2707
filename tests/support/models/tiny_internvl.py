"""A tiny InternVL3 as its "-hf" checkpoints are: a class token, layer scales, and Qwen2 with a dynamic scaling it never needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_folders import write_model, write_tokenizer
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

SIZE = (56, 112)  # 1 x 2 tiles and the thumbnail
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


def config(vocabulary: int = 500, image_token: int = 456, **vision: Any) -> InternVLConfig:
    """Return 3 vision heads of 8 with biases, and 6 text heads on 2 KV heads of 8."""
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000000.0, "factor": 2.0},
    }
    return InternVLConfig(
        text_config=text | {"model_type": "qwen2"},
        vision_config=sizes | {"attention_bias": True, "image_size": [56, 56], "patch_size": [14, 14]} | vision,
        image_token_id=image_token,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def processor() -> dict[str, Any]:
    """Return the image processor's settings, of those that InternVL3-1B-hf ships the same keys."""
    return {
        "crop_to_patches": False,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "image_std": [0.229, 0.224, 0.225],
        "max_patches": 12,
        "min_patches": 1,
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 56, "width": 56},
    }


def folder(path: Path) -> Path:
    """Write the model folder and return it."""
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = write_tokenizer(path, TEMPLATE, **named, video_token="<video>")
    sizes = config(len(tokenizer), tokenizer.context_image_token_id)
    return write_model(path, InternVLForConditionalGeneration, sizes, processor(), image_seq_length=4)


def inputs(loaded_folder: Path, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """Return what transformers' own image processor makes of the images of one prompt; its text processor asks for tiles."""
    made = GotOcr2ImageProcessorPil.from_pretrained(loaded_folder)(list(images), crop_to_patches=True, return_tensors="pt")
    return {"pixel_values": made["pixel_values"]}
