"""Writes a checkpoint of a shape, the same in the forms that peers read, and the images to ask about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeprune.plan import Geometry
from edgeprune.tabletop import MODEL_FOLDER
from edgeprune.tabletop.dataset import frames_for
from shapes.shape import Shape

WEIGHTS = "model.safetensors"
BUNDLED_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"  # as the bundled chat template has it


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """Write a folder as transformers has them: weights in bf16, the bundled model's tokenizer and chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    tokenizer.add_special_tokens({"extra_special_tokens": list(shape.tokens)}, replace_extra_special_tokens=False)
    tokenizer.chat_template = tokenizer.chat_template.replace(BUNDLED_PICTURE, shape.picture)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(shape.model_type, **shape.config(tokenizer.get_vocab()))
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder, max_shard_size="100GB")
    for name, settings in shape.processor().items():
        _write(folder / name, settings)


def write_for_transformers_4(shape: Shape, checkpoint: Path, folder: Path) -> None:
    """Write the same checkpoint as transformers 4 reads it; weights are linked, not copied."""
    folder.mkdir()
    for name in (WEIGHTS, "tokenizer.json", "chat_template.jinja", *shape.processor()):
        (folder / name).hardlink_to(checkpoint / name)
    config = _read(checkpoint / "config.json")
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rope["rope_theta"]
    config["vision_config"].pop("rope_parameters", None)
    shape.make_older(config, rope)
    _write(folder / "config.json", config | {"torch_dtype": config.pop("dtype")})
    _write_tokenizer(checkpoint, folder)


def write_decoder_alone(shape: Shape, checkpoint: Path, folder: Path) -> None:
    """Write the decoder as a language model, for what does not know the family; rotary positions of several parts become one."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    (folder / "tokenizer.json").hardlink_to(checkpoint / "tokenizer.json")
    config = _read(checkpoint / "config.json")
    text, tied = config["text_config"], config["tie_word_embeddings"]
    alone = {"architectures": [shape.decoder_class], "model_type": shape.decoder_type, "tie_word_embeddings": tied}
    theta = text.pop("rope_parameters")["rope_theta"]
    _write(folder / "config.json", text | alone | {"rope_theta": theta, "torch_dtype": "bfloat16"})
    weights = {
        name.replace(shape.decoder_prefix, "model.", 1): tensor
        for name, tensor in load_file(checkpoint / WEIGHTS).items()
        if name.startswith((shape.decoder_prefix, "lm_head."))
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    _write_tokenizer(checkpoint, folder)


def write_images(shape: Shape, folder: Path, count: int) -> list[Path]:
    """Return `count` different images of the shape's size, written where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed}.png" for seed in range(count)]
    for seed, path in enumerate(paths):
        if not path.exists():
            frames_for(Geometry(shape.side, shape.side, 1, 1), seed)[0].save(path)
    return paths


def _write_tokenizer(checkpoint: Path, folder: Path) -> None:
    tokenizer = _read(checkpoint / "tokenizer_config.json")
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": tokenizer.pop("extra_special_tokens")}
    _write(folder / "tokenizer_config.json", tokenizer | special)
    _write(folder / "generation_config.json", {"eos_token_id": 2, "pad_token_id": 0})


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
