"""A tiny PaliGemma: 4 x 4 patches, Gemma with one KV head and heads wider than their share of the states, no chat template.

Its head is not tied to the scaled embeddings, as the real one's is: so small a model would say its last token again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_folders import write_model, write_tokenizer
from tiny_llava import TEXT, VISION
from transformers import AutoTokenizer, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SIZE = (56, 56)
ONE_TURN = True


def config(vocabulary: int = 500, image_token: int = 456, **changes: Any) -> PaliGemmaConfig:
    """Return 3 vision heads of 8 with biases, and 4 text heads of 16 on one KV head."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
    sizes = {
        "text_config": TEXT | heads | {"model_type": "gemma", "vocab_size": vocabulary},
        "vision_config": VISION
        | {"model_type": "siglip_vision_model", "patch_size": 14, "image_size": 56, "vision_use_head": False},
        "image_token_index": image_token,
        "projection_dim": 48,
        "hidden_size": 48,
        "tie_word_embeddings": False,
    }
    return PaliGemmaConfig(**(sizes | changes))


def processor() -> dict[str, Any]:
    """Return the image processor's settings, of those that paligemma-3b-mix-224 ships the same keys."""
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": 16,
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "PaliGemmaProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 56, "width": 56},
    }


def folder(path: Path, config: Callable[[int, int], PaliGemmaConfig] = config) -> Path:
    """Write the model folder and return it; `config`: the configuration for a vocabulary and an image token."""
    write_tokenizer(path, "", "<image>")
    (path / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.save_pretrained(path)
    sizes = config(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    return write_model(path, PaliGemmaForConditionalGeneration, sizes, processor())


def inputs(loaded_folder: Path, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """Return what transformers' own image processor makes of the images of one prompt."""
    made = SiglipImageProcessorPil.from_pretrained(loaded_folder)(list(images), return_tensors="pt")
    return {"pixel_values": made["pixel_values"]}
