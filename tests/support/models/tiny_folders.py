"""What the tiny folders of all families have in common: the bundled tokenizer with tokens of their own, and random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tiny_models import write_words
from transformers import AutoTokenizer


def write_tokenizer(path: Path, template: str, *tokens: str, **named: str) -> Any:
    """Write the bundled tokenizer with more special tokens, `named` ones known by name, and a chat template; return it."""
    write_words(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    # Only the family's own template may be there.
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"extra_special_tokens": [*tokens, *named.values()]}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(path)
    if named:
        config = path / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"extra_special_tokens": named}))
        tokenizer = AutoTokenizer.from_pretrained(path)
    return tokenizer


def write_model(path: Path, kind: Any, config: Any, processor: Mapping[str, Any], **combined: Any) -> Path:
    """Write a model of random weights, large enough that attention is not flat, and the settings of its image processor.

    `combined`: settings of its processor_config.json, if it has one.
    """
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    if combined:
        (path / "processor_config.json").write_text(json.dumps(combined))
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = 2
    model.generation_config.do_sample = False
    model.save_pretrained(path)
    return path


def cut(views: torch.Tensor, patch: int) -> torch.Tensor:
    """Return the whole patches [patches, 3 * patch * patch] of views [views, 3, height, width], each in reading order."""
    blocks = views.unfold(2, patch, patch).unfold(3, patch, patch)  # [views, 3, rows, columns, patch, patch]
    return blocks.permute(0, 2, 3, 1, 4, 5).reshape(-1, views.shape[1] * patch * patch)
