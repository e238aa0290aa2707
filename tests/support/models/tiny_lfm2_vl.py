"""A tiny LFM2-VL: tiles of 2 x 2 visual tokens and a thumbnail of 2 x 3, two convolutions and two layers of attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lfm2_vl_processor import upstream_processor
from PIL import Image
from tiny_folders import write_model, write_tokenizer
from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

SIZE = (64, 96)  # 2 x 3 tiles and the thumbnail
MARKS = ("<|startoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- for content in message['content'] -%}{%- if content['type'] == 'image' -%}{{- '<image>' -}}"
    "{%- elif content['type'] == 'text' -%}{{- content['text'] -}}{%- endif -%}{%- endfor -%}{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def config(vocabulary: int = 500, image_token: int = 456, **sizes: Any) -> Lfm2VlConfig:
    """Return 2 vision heads of 12, and 4 text heads on 2 KV heads of 12."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    return Lfm2VlConfig(
        text_config=text | {"model_type": "lfm2"} | sizes,
        vision_config=vision | {"model_type": "siglip2_vision_model", "patch_size": 8, "num_patches": 25, "vision_use_head": False},
        image_token_id=image_token,
        projector_hidden_size=40,
        projector_use_layernorm=True,
        downsample_factor=2,
        tie_word_embeddings=True,
    )


def processor() -> dict[str, Any]:
    """Return the image processor's settings, of those that LFM2-VL-450M ships the same keys."""
    return {
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "downsample_factor": 2,
        "encoder_patch_size": 8,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Lfm2VlImageProcessorFast",
        "image_std": [0.5, 0.5, 0.5],
        "max_image_tokens": 8,
        "max_pixels_tolerance": 2.0,
        "max_tiles": 6,
        "min_image_tokens": 4,
        "min_tiles": 2,
        "processor_class": "Lfm2VlProcessor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "tile_size": 32,
        "use_thumbnail": True,
    }


def folder(path: Path) -> Path:
    """Write the model folder and return it."""
    tags = [f"<|img_row_{row}_col_{column}|>" for row in (1, 2) for column in (1, 2, 3)]
    tokenizer = write_tokenizer(path, TEMPLATE, *MARKS, *tags)
    sizes = config(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    write_model(path, Lfm2VlForConditionalGeneration, sizes, processor())
    _sharpen(path)
    return path


def _sharpen(path: Path) -> None:
    # A convolution is a product of three projections: random ones are so small that no answer depends on its state.
    model = Lfm2VlForConditionalGeneration.from_pretrained(path)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            if not layer.is_attention_layer:
                layer.conv.in_proj.weight.mul_(4)
                layer.conv.conv.weight.mul_(10)
    model.save_pretrained(path)


def image_processor(loaded_folder: Path) -> Any:
    """Return transformers' own image processor, which cannot be loaded without torchvision."""
    return upstream_processor(loaded_folder / "preprocessor_config.json")


def inputs(loaded_folder: Path, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """Return what transformers' own image processor makes of the images of one prompt."""
    made = image_processor(loaded_folder)(list(images))
    return {name: made[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}
