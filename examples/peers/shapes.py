"""Checkpoints of true shapes and random weights, and the same in the forms that peers read; the images to ask about."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.plan import Geometry
from edgeprune.tabletop import MODEL_FOLDER
from edgeprune.tabletop.showing import frames_for

VOCABULARY = 151936
TRUE_VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "spatial_merge_size": 2}


@dataclass(frozen=True)
class Shape:
    """A Qwen2-VL: the numbers of its decoder, its vision tower, and the side of the square image in pixels."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vision: dict[str, int]
    side: int

    @property
    def geometry(self) -> Geometry:
        """The image, in pixels and patches."""
        return Geometry(self.side, self.side, self.vision["patch_size"], self.vision["spatial_merge_size"])


SHAPES = {
    "qwen2-vl-0.5b": Shape(896, 4864, 24, 14, 2, TRUE_VISION, 756),  # over Qwen2-0.5B, which there is none of; 729 visual tokens
    "qwen2-vl-2b": Shape(1536, 8960, 28, 12, 2, TRUE_VISION, 756),
    "qwen2-vl-2b-small-image": Shape(1536, 8960, 28, 12, 2, TRUE_VISION, 448),  # 256 visual tokens
    "tiny": Shape(256, 512, 4, 4, 2, TRUE_VISION | {"depth": 2, "embed_dim": 128, "num_heads": 2}, 224),  # to try the scripts
}


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """Write a folder as transformers has them: weights in bf16, the bundled model's tokenizer and chat template."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**_config(shape)))
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL_FOLDER / name, folder)
    area = shape.side**2
    processor = _read(MODEL_FOLDER / "preprocessor_config.json") | {
        "patch_size": shape.vision["patch_size"],
        "merge_size": shape.vision["spatial_merge_size"],
        "size": {"shortest_edge": area, "longest_edge": area},
        "min_pixels": area,  # the same, as older versions and OpenVINO GenAI read it
        "max_pixels": area,
    }
    _write(folder / "preprocessor_config.json", processor)


def _config(shape: Shape) -> dict[str, Any]:
    head = shape.hidden // shape.heads
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 32768,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [head // 8, head * 3 // 16, head * 3 // 16],
        },
    }
    tokens = {name: value for name, value in _read(MODEL_FOLDER / "config.json").items() if name.endswith("_token_id")}
    vision = shape.vision | {"hidden_size": shape.hidden}
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": True, **tokens}


def write_for_transformers_4(checkpoint: Path, folder: Path) -> None:
    """Write the same checkpoint as transformers 4 reads it; weights are linked, not copied."""
    _link(checkpoint, folder, ("model.safetensors", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"))
    config = _read(checkpoint / "config.json")
    config["text_config"] |= _rope(config["text_config"].pop("rope_parameters"))
    config["vision_config"].pop("rope_parameters", None)
    config["vision_config"]["model_type"] = "qwen2_vl"
    config["hidden_size"] = config["text_config"]["hidden_size"]
    _write(folder / "config.json", config | {"torch_dtype": config.pop("dtype")})
    _write_tokenizer(checkpoint, folder)


def write_decoder_alone(checkpoint: Path, folder: Path) -> None:
    """Write the decoder as a Qwen2 language model, for what knows no Qwen2-VL; it differs in the rotary positions alone."""
    _link(checkpoint, folder, ("model.safetensors", "tokenizer.json"))
    text = _read(checkpoint / "config.json")["text_config"]
    theta = text.pop("rope_parameters")["rope_theta"]
    alone = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": theta, "tie_word_embeddings": True}
    _write(folder / "config.json", text | alone | {"torch_dtype": "bfloat16"})
    _write_tokenizer(checkpoint, folder)


def write_images(shape: Shape, folder: Path, count: int) -> list[Path]:
    """Return `count` different images of the shape's size, written where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed}.png" for seed in range(count)]
    for seed, path in enumerate(paths):
        if not path.exists():
            frames_for(shape.geometry, seed)[0].save(path)
    return paths


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    return {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}


def _write_tokenizer(checkpoint: Path, folder: Path) -> None:
    tokenizer = _read(checkpoint / "tokenizer_config.json")
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": tokenizer.pop("extra_special_tokens")}
    _write(folder / "tokenizer_config.json", tokenizer | special)
    _write(folder / "generation_config.json", {"eos_token_id": 2, "pad_token_id": 0})


def _link(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    folder.mkdir()
    for name in names:
        (folder / name).hardlink_to(source / name)


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
