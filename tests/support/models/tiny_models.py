"""Tiny random models with awkward sizes and the bundled tokenizer: folders as `save_pretrained` writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from edgeprune.plan import Geometry
from edgeprune.tabletop import MODEL_FOLDER

WORDS = 455
TINY_GEOMETRY = Geometry(height=84, width=112, patch=14, merge=2)  # 3 x 4 visual tokens


def write_words(folder: Path) -> None:
    """Write the first WORDS tokens of the bundled tokenizer: later words would draw other random weights for every tiny model."""
    shutil.copy(MODEL_FOLDER / "tokenizer_config.json", folder)
    tokenizer = json.loads((MODEL_FOLDER / "tokenizer.json").read_text())
    words = {text: number for text, number in tokenizer["model"]["vocab"].items() if number < WORDS}
    tokenizer["model"]["merges"] = [merge for merge in tokenizer["model"]["merges"] if "".join(merge) in words]
    tokenizer["model"]["vocab"] = words
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def model_folder(folder: Path, kind: Any, config: Any, size: tuple[int, int] = (84, 112)) -> Path:
    """Write a model of random weights with the bundled tokenizer and a processor of 14-pixel patches; return the folder."""
    write_words(folder)
    shutil.copy(MODEL_FOLDER / "chat_template.jinja", folder)
    processor = json.loads((MODEL_FOLDER / "preprocessor_config.json").read_text())
    processor |= {"patch_size": 14, "merge_size": 2, "size": {"shortest_edge": 784, "longest_edge": size[0] * size[1]}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    import torch

    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)  # large enough that attention is not flat
    model.generation_config.eos_token_id = 2
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    return folder


def qwen2_vl_config(sizes: dict[str, Any]) -> Any:
    """Return the configuration of the tiny Qwen2-VL, with some text sizes changed."""
    from transformers import Qwen2VLConfig

    vision = {"depth": 2, "embed_dim": 32, "hidden_size": sizes.get("hidden_size", 48), "num_heads": 2}
    return tiny_config(Qwen2VLConfig, vision, sizes)


def tiny_config(kind: Any, vision: dict[str, Any], sizes: dict[str, Any] | None = None) -> Any:
    """Return a configuration for the bundled tokenizer: 3 layers, 6 heads on 2 KV heads of 8, unless `sizes` says otherwise."""
    shipped = json.loads((MODEL_FOLDER / "config.json").read_text())
    text = {
        "vocab_size": WORDS,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }
    vision = {"patch_size": 14, "spatial_merge_size": 2} | vision
    tokens = {name: value for name, value in shipped.items() if name.endswith("_token_id")}
    return kind(text_config=text | (sizes or {}), vision_config=vision, tie_word_embeddings=False, **tokens)
