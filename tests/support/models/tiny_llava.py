"""A tiny LLaVA-1.5: CLIP's features of the last layer but one, 5 x 5 patches, a Llama decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_folders import write_model, write_tokenizer
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIZE = (70, 70)
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Of its processor, as llava-1.5-7b-hf ships it.
COMBINED = {
    "image_token": "<image>",
    "num_additional_image_tokens": 1,
    "patch_size": 14,
    "processor_class": "LlavaProcessor",
    "vision_feature_select_strategy": "default",
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 70}


def config(vocabulary: int = 500, image_token: int = 456, encoder: str = "clip_vision_model", **changes: Any) -> LlavaConfig:
    """Return 3 vision heads of 8 with biases, and 6 text heads on 2 KV heads of 8."""
    sizes = {
        "text_config": TEXT | {"model_type": "llama", "vocab_size": vocabulary},
        "vision_config": VISION | {"model_type": encoder, "patch_size": 14},
        "image_token_index": image_token,
        "image_seq_length": 25,
        "tie_word_embeddings": False,
    }
    return LlavaConfig(**(sizes | changes))


def processor() -> dict[str, Any]:
    """Return the image processor's settings, of those that llava-1.5-7b-hf ships the same keys."""
    return {
        "crop_size": {"height": 70, "width": 70},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 70},
    }


def folder(path: Path) -> Path:
    """Write the model folder and return it."""
    tokenizer = write_tokenizer(path, TEMPLATE, "<image>")
    sizes = config(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    return write_model(path, LlavaForConditionalGeneration, sizes, processor(), **COMBINED)


def inputs(loaded_folder: Path, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """Return what transformers' own image processor makes of the images of one prompt."""
    made = CLIPImageProcessorPil.from_pretrained(loaded_folder)(list(images), return_tensors="pt")
    return {"pixel_values": made["pixel_values"]}
