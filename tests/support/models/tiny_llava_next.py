"""A tiny LLaVA-NeXT: CLIP with 5 x 5 patches a tile and pixels that fill none, bars, and a Mistral decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_folders import write_model, write_tokenizer
from tiny_llava import COMBINED, TEXT, VISION
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

SIZE = (80, 120)  # an overview, and 1 x 2 tiles: 5 x 8 tokens without the bars
PINPOINTS = [[72, 144], [144, 72], [144, 144], [216, 72], [72, 216]]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'assistant' %}{{ '[INST] ' }}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ '</s> ' }}{% else %}{{ ' [/INST]' }}{% endif %}{% endfor %}"
)


def config(vocabulary: int = 500, image_token: int = 456, **changes: Any) -> LlavaNextConfig:
    """Return 3 vision heads of 8 with biases, and 6 text heads on 2 KV heads of 8."""
    sizes = {
        "text_config": TEXT | {"model_type": "mistral", "vocab_size": vocabulary, "sliding_window": None},
        "vision_config": VISION | {"model_type": "clip_vision_model", "patch_size": 14, "image_size": 72},
        "image_token_index": image_token,
        "image_grid_pinpoints": PINPOINTS,
        "tie_word_embeddings": False,
    }
    return LlavaNextConfig(**(sizes | changes))


def processor(pinpoints: list[list[int]] | None = None) -> dict[str, Any]:
    """Return the image processor's settings, of those that llava-v1.6-mistral-7b-hf ships the same keys."""
    return {
        "aspect_ratio_setting": "anyres",
        "crop_size": {"height": 72, "width": 72},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": pinpoints or PINPOINTS,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "LlavaNextImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": "LlavaNextProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 72},
    }


def folder(path: Path) -> Path:
    """Write the model folder and return it."""
    tokenizer = write_tokenizer(path, TEMPLATE, "<image>")
    sizes = config(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    return write_model(
        path, LlavaNextForConditionalGeneration, sizes, processor(), **COMBINED | {"processor_class": "LlavaNextProcessor"}
    )


def inputs(loaded_folder: Path, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """Return what transformers' own image processor makes of the images of one prompt."""
    made = LlavaNextImageProcessorPil.from_pretrained(loaded_folder)(list(images), return_tensors="pt")
    return {"pixel_values": made["pixel_values"], "image_sizes": made["image_sizes"]}
