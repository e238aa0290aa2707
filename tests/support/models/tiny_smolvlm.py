"""A tiny SmolVLM2: 4 x 4 patches merged, tags as special tokens, a tied head, and videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny_idefics3
import torch
from PIL import Image
from tiny_folders import write_model, write_tokenizer
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

SIZE = (128, 256)  # 1 x 2 tiles and the whole
TEMPLATE = tiny_idefics3.TEMPLATE.replace("<|begin_of_text|>", "<|im_start|>")


def config(vocabulary: int = 500, image_token: int = 456) -> SmolVLMConfig:
    """Return 3 vision heads of 8, and 3 text heads on 1 KV head of 16."""
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
    text = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": vocabulary}
    rope = {"rope_type": "default", "rope_theta": 100000.0}
    return SmolVLMConfig(
        text_config=text
        | {"model_type": "llama", "intermediate_size": 56, "num_hidden_layers": 2, "pad_token_id": 0}
        | {"max_position_embeddings": 1024, "rope_parameters": rope, "tie_word_embeddings": True},
        vision_config=vision | {"image_size": 128, "patch_size": 16},
        image_token_id=image_token,
        scale_factor=4,
        pad_token_id=0,
        tie_word_embeddings=True,
    )


def processor() -> dict[str, Any]:
    """Return the image processor's settings, of those that SmolVLM2 ships the same keys."""
    return tiny_idefics3.processor() | {
        "image_processor_type": "SmolVLMImageProcessor",
        "max_image_size": {"longest_edge": 128},
        "processor_class": "SmolVLMProcessor",
        "size": {"longest_edge": 256},
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 128}},
    }


def folder(path: Path) -> Path:
    """Write the model folder and return it."""
    tags = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    markers = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    tokenizer = write_tokenizer(path, TEMPLATE, *markers, *tags)
    sizes = config(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    return write_model(path, SmolVLMForConditionalGeneration, sizes, processor(), image_seq_len=4)


def inputs(loaded_folder: Path, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """Return what transformers' own image processor makes of the images of one prompt."""
    return dict(SmolVLMImageProcessorPil.from_pretrained(loaded_folder)(list(images), return_tensors="pt"))
