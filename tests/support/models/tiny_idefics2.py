"""A tiny Idefics2: 12 latents resampled from as many patches as an image has, a Mistral decoder with a sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_folders import write_model, write_tokenizer
from transformers import Idefics2Config, Idefics2ForConditionalGeneration
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

SIZE = (70, 98)  # 5 x 7 patches
TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize()}}{% if message['content'][0]['type'] == 'image' %}{{':'}}"
    "{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def config(vocabulary: int = 500, image_token: int = 456) -> Idefics2Config:
    """Return 3 vision heads of 8, 4 resampler heads on 2 KV heads of 6, and 6 text heads on 2 KV heads of 8."""
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
    perceiver = {"hidden_size": 48, "rms_norm_eps": 1e-5, "resampler_n_latents": 12, "resampler_depth": 2}
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "sliding_window": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
    }
    return Idefics2Config(
        text_config=text | {"model_type": "mistral"},
        vision_config=vision | {"image_size": 84, "patch_size": 14},
        perceiver_config=perceiver | {"resampler_n_heads": 4, "resampler_head_dim": 6, "num_key_value_heads": 2},
        image_token_id=image_token,
        tie_word_embeddings=False,
    )


def processor(splitting: bool = False) -> dict[str, Any]:
    """Return the image processor's settings, of those that idefics2-8b ships the same keys."""
    return {
        "do_convert_rgb": True,
        "do_image_splitting": splitting,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Idefics2ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Idefics2Processor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": 98, "shortest_edge": 42},
    }


def folder(path: Path) -> Path:
    """Write the model folder and return it."""
    tokenizer = write_tokenizer(path, TEMPLATE, "<fake_token_around_image>", "<image>", "<end_of_utterance>")
    sizes = config(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    return write_model(path, Idefics2ForConditionalGeneration, sizes, processor(), image_seq_len=12)


def inputs(loaded_folder: Path, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """Return what transformers' own image processor makes of the images of one prompt."""
    return dict(Idefics2ImageProcessorPil.from_pretrained(loaded_folder)(list(images), return_tensors="pt"))
