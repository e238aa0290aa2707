"""A tiny Ministral 3: Pixtral's encoder, 2 x 2 patches a token, YaRN, and queries that are scaled from position 16 on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_folders import write_model, write_tokenizer
from tiny_llava import TEXT, VISION
from transformers import Mistral3Config, Mistral3ForConditionalGeneration
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

SIZE = (84, 112)  # 3 x 4 tokens
TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + message['content'][0]['text'] + '[/SYSTEM_PROMPT]' }}{% elif message['role'] == 'user' %}"
    "{{ '[INST]' }}{% for block in message['content'] %}{% if block['type'] == 'text' %}{{ block['text'] }}"
    "{% elif block['type'] == 'image' %}{{ '[IMG]' }}{% endif %}{% endfor %}{{ '[/INST]' }}{% else %}"
    "{% for block in message['content'] %}{{ block['text'] }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
)
YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 64.0,
    "llama_4_scaling_beta": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1000000.0,
    "rope_type": "yarn",
    "type": "yarn",
}
PIXTRAL = {name: size for name, size in VISION.items() if name != "image_size"} | {
    "model_type": "pixtral",
    "hidden_act": "silu",
    "head_dim": 8,
    "image_size": 112,
    "patch_size": 14,
    "rope_theta": 10000.0,
}


def config(vocabulary: int = 500, image_token: int = 456, text: str = "ministral3", **changes: Any) -> Mistral3Config:
    """Return 3 vision heads of 8, and 6 text heads on 2 KV heads of 8."""
    rope = {"rope_parameters": YARN if text == "ministral3" else TEXT["rope_parameters"]}
    sizes = {
        "text_config": TEXT | rope | {"model_type": text, "vocab_size": vocabulary, "head_dim": 8, "sliding_window": None},
        "vision_config": PIXTRAL,
        "image_token_index": image_token,
        "tie_word_embeddings": False,
    }
    return Mistral3Config(**(sizes | changes))


def processor() -> dict[str, Any]:
    """Return the image processor's settings, of those that Mistral-Small-3.1-24B-Instruct-2503 ships the same keys."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "PixtralImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": 14,
        "processor_class": "PixtralProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": 112},
    }


def folder(path: Path) -> Path:
    """Write the model folder and return it."""
    tokenizer = write_tokenizer(path, TEMPLATE, *TOKENS)
    sizes = config(len(tokenizer), tokenizer.convert_tokens_to_ids("[IMG]"))
    return write_model(path, Mistral3ForConditionalGeneration, sizes, processor(), patch_size=14, spatial_merge_size=2)


def inputs(loaded_folder: Path, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """Return what transformers' own image processor makes of the images of one prompt, with visual tokens of 2 x 2 patches."""
    made = PixtralImageProcessorPil.from_pretrained(loaded_folder)(list(images), patch_size=28, return_tensors="pt")
    return {"pixel_values": made["pixel_values"], "image_sizes": made["image_sizes"]}
