"""A tiny Gemma 3: 8 x 8 patches averaged to 16 visual tokens, local and global layers, a window shorter than any conversation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_folders import write_model, write_tokenizer
from tiny_llava import VISION
from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

SIZE = (112, 112)
# That of transformers' convert_gemma3_weights.py, without the check that roles alternate.
TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
{%- set first = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- for message in turns -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + (first if loop.first else '') }}
{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- else -%}{{ item['text'] | trim }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
NAMED = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
TEXT = {
    "model_type": "gemma3_text",
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 25,
    "sliding_window": 12,  # fewer than visual tokens
    "max_position_embeddings": 1024,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def config(vocabulary: int = 500, image_token: int = 456, **changes: Any) -> Gemma3Config:
    """Return 3 vision heads of 8, and 4 text heads of 16 on 2 KV heads."""
    sizes = {
        "text_config": TEXT | {"vocab_size": vocabulary},
        "vision_config": VISION
        | {"model_type": "siglip_vision_model", "patch_size": 14, "image_size": 112, "vision_use_head": False},
        "mm_tokens_per_image": 16,
        "image_token_index": image_token,
        "tie_word_embeddings": False,
    }
    return Gemma3Config(**(sizes | changes))


def processor() -> dict[str, Any]:
    """Return the image processor's settings, of those that gemma-3-4b-it ships the same keys."""
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pan_and_scan": None,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": 16,
        "image_std": [0.5, 0.5, 0.5],
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None,
        "processor_class": "Gemma3Processor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 112, "width": 112},
    }


def folder(path: Path) -> Path:
    """Write the model folder and return it."""
    write_tokenizer(path, TEMPLATE, "<start_of_turn>", "<end_of_turn>", **NAMED)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.save_pretrained(path)
    (path / "processor_config.json").write_text('{"processor_class": "Gemma3Processor", "image_seq_length": 16}')
    sizes = config(len(tokenizer), tokenizer.convert_tokens_to_ids("<image_soft_token>"))
    return write_model(path, Gemma3ForConditionalGeneration, sizes, processor())


def inputs(loaded_folder: Path, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """Return what transformers' own image processor makes of the images of one prompt."""
    made = Gemma3ImageProcessorPil.from_pretrained(loaded_folder)(list(images), return_tensors="pt")
    return {"pixel_values": made["pixel_values"]}
