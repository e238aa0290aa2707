"""A tiny LLaVA-OneVision: 5 x 5 patches a tile and pixels that fill none, bars, shrinking, and Qwen2 with a tied head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_folders import write_model, write_tokenizer
from tiny_llava import TEXT, VISION
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

SIZE = (80, 120)  # an overview, and 1 x 2 tiles: 5 x 8 tokens without the bars, shrunk to 3 x 6
PINPOINTS = [[72, 72], [72, 144], [144, 72]]
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{# Render all video then #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def config(vocabulary: int = 500, image_token: int = 456, video_token: int = 457, **changes: Any) -> LlavaOnevisionConfig:
    """Return 3 vision heads of 8 with biases, and 6 text heads on 2 KV heads of 8."""
    sizes = {
        "text_config": TEXT | {"model_type": "qwen2", "vocab_size": vocabulary, "tie_word_embeddings": True},
        "vision_config": VISION
        | {"model_type": "siglip_vision_model", "patch_size": 14, "image_size": 72, "vision_use_head": False},
        "image_token_index": image_token,
        "video_token_index": video_token,
        "image_grid_pinpoints": PINPOINTS,
        "vision_aspect_ratio": "anyres_max_1",
        "tie_word_embeddings": True,
    }
    return LlavaOnevisionConfig(**(sizes | changes))


def processor(pinpoints: list[list[int]] | None = None) -> dict[str, Any]:
    """Return the image processor's settings, of those that llava-onevision-qwen2-0.5b-ov-hf ships the same keys."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": pinpoints or PINPOINTS,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "LlavaOnevisionProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 72, "width": 72},
    }


def folder(path: Path) -> Path:
    """Write the model folder and return it."""
    tokenizer = write_tokenizer(path, TEMPLATE, "<image>", "<video>")
    sizes = config(len(tokenizer), *tokenizer.convert_tokens_to_ids(["<image>", "<video>"]))
    settings = {"processor_class": "LlavaOnevisionProcessor", "image_token": "<image>", "video_token": "<video>"}
    combined = {**settings, "num_image_tokens": 25, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_1"}
    return write_model(path, LlavaOnevisionForConditionalGeneration, sizes, processor(), **combined)


def inputs(loaded_folder: Path, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """Return what transformers' own image processor makes of the images of one prompt, each with tiles."""
    made = LlavaOnevisionImageProcessorPil.from_pretrained(loaded_folder)(list(images), return_tensors="pt")
    return {"pixel_values": made["pixel_values"], "image_sizes": made["image_sizes"]}
