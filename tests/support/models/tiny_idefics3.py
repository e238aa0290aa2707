"""A tiny Idefics3: tiles of 2 x 2 visual tokens, row and column tags in plain text as Idefics3-8B-Llama3 has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_folders import write_model, write_tokenizer
from transformers import Idefics3Config, Idefics3ForConditionalGeneration
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

SIZE = (112, 168)  # 2 x 3 tiles and the whole
TEMPLATE = (
    "<|begin_of_text|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def config(vocabulary: int = 500, image_token: int = 456, **sizes: Any) -> Idefics3Config:
    """Return 3 vision heads of 8, and 6 text heads on 2 KV heads of 8."""
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "pad_token_id": 0,
    }
    return Idefics3Config(
        text_config=text | {"model_type": "llama"} | sizes,
        vision_config=vision | {"image_size": 56, "patch_size": 14},
        image_token_id=image_token,
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def processor() -> dict[str, Any]:
    """Return the image processor's settings, of those that Idefics3-8B-Llama3 ships the same keys."""
    return {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Idefics3ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": 56},
        "processor_class": "Idefics3Processor",
        "resample": 1,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": 168},
    }


def folder(path: Path) -> Path:
    """Write the model folder and return it."""
    markers = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<|begin_of_text|>")
    tokenizer = write_tokenizer(path, TEMPLATE, *markers)
    sizes = config(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    return write_model(path, Idefics3ForConditionalGeneration, sizes, processor(), image_seq_len=4)


def inputs(loaded_folder: Path, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """Return what transformers' own image processor makes of the images of one prompt."""
    return dict(Idefics3ImageProcessorPil.from_pretrained(loaded_folder)(list(images), return_tensors="pt"))
