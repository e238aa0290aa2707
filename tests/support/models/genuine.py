"""Folders with the small files of published checkpoints (tests/support/genuine), a vocabulary of their kind, and random weights.

Sizes are small; ids, token names, templates, image sizes and generation settings are the published ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from repository import TESTS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

FILES = TESTS / "support" / "genuine"
NAMES = sorted(path.name for path in FILES.iterdir() if (path / "config.json").is_file())
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_window_layers": 2,
    "head_dim": 16,
}
_VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
_QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e7, "mrope_interleaved": True}
_TEXT_OF: dict[str, dict[str, Any]] = {
    "gemma3": {"head_dim": 16, "sliding_window_pattern": 2},
    "lfm2_vl": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "block_ff_dim": 40},
    "paligemma": {"head_dim": 16},
    "qwen3_5": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "rope_parameters": _QWEN_ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
    },
}
_QWEN_TOWER = {"hidden_size": 32, "num_heads": 2}
_VISION_OF: dict[str, dict[str, Any]] = {
    "paligemma": {**_VISION, "projection_dim": 32},
    "qwen2_vl": {**_QWEN_TOWER, "depth": 2, "embed_dim": 32},
    "qwen2_5_vl": {**_QWEN_TOWER, "depth": 4, "intermediate_size": 40, "out_hidden_size": 32, "fullatt_block_indexes": [1, 3]},
    "qwen3_5": {**_QWEN_TOWER, "depth": 2, "intermediate_size": 40, "out_hidden_size": 32},
    "qwen3_vl": {**_QWEN_TOWER, "depth": 4, "intermediate_size": 40, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1]},
    "vipllava": {**_VISION, "num_hidden_layers": 12},
}
_SENTENCEPIECE = ("LlamaTokenizer", "GemmaTokenizer")
_GEMMA = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 257152: "<image>"}  # tokenizer_config.json of PaliGemma was not found
_WORDS = ("What", "is", "the", "colour", "of", "cube", "?", "And", "here", "User", "Assistant", "system", "user", "assistant")


def write_files(name: str, folder: Path) -> Path:
    """Write all files of a checkpoint but its weights; return the folder."""
    shutil.copytree(FILES / name, folder, dirs_exist_ok=True)
    config = _shrunk(json.loads((FILES / name / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    if name.startswith("paligemma"):
        tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
        settings = {"tokenizer_class": "GemmaTokenizer", "extra_special_tokens": {"image_token": "<image>"}, **tokens}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    _tokenizer(folder).save(str(folder / "tokenizer.json"))
    return folder


def write_checkpoint(name: str, folder: Path) -> Path:
    """Write a checkpoint with random weights under the published tensor names; return the folder."""
    write_files(name, folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    own = (folder / "config.json").read_text(), (folder / "generation_config.json")
    generation = own[1].read_text() if own[1].is_file() else None
    model.generation_config = transformers.GenerationConfig()
    model.save_pretrained(folder)
    (folder / "config.json").write_text(own[0])
    own[1].unlink()
    if generation is not None:
        own[1].write_text(generation)
    return folder


def _shrunk(config: dict[str, Any]) -> dict[str, Any]:
    # The same configuration with small sizes.
    kind = config["model_type"]
    text = config.get("text_config", config)
    text |= {name: size for name, size in _TEXT.items() if name in text or name not in ("head_dim", "max_window_layers")}
    if text.get("rope_scaling", {}) and "mrope_section" in text["rope_scaling"]:
        text["rope_scaling"] = {**text["rope_scaling"], "mrope_section": [2, 3, 3]}
    text |= _TEXT_OF.get(kind, {})
    if kind == "paligemma":
        config |= {"hidden_size": 32, "projection_dim": 32}
    if kind == "lfm2_vl":
        config["projector_hidden_size"] = 32
    vision = config["vision_config"]
    vision |= _VISION_OF.get(kind, _VISION) | ({"head_dim": 8} if "head_dim" in vision else {})
    if kind == "idefics2":
        resampler = {"resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 8}
        config["perceiver_config"] |= {**resampler, "num_key_value_heads": 1, "hidden_size": 32, "rms_norm_eps": 1e-5}
    return config


def _tokenizer(folder: Path) -> Tokenizer:
    # Bytes, some words and fillers, and the special tokens at their published ids.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {int(number): token["content"] for number, token in settings.get("added_tokens_decoder", {}).items()} or _GEMMA
    sentencepiece = settings["tokenizer_class"] in _SENTENCEPIECE
    pieces = _sentencepiece() if sentencepiece else _bytelevel()
    merges = list[tuple[str, str]]()
    vocabulary = {token: number for number, token in added.items()}
    number = 0
    for piece in pieces:
        while number in added:
            number += 1
        left, right = piece if isinstance(piece, tuple) else (piece, "")
        merges += [(left, right)] if right else []
        vocabulary.setdefault(left + right, number)
        number += 1
    size = max(*added, number) + 1
    taken = set(vocabulary.values())
    vocabulary |= {f"<unused{filler}>": filler for filler in range(size) if filler not in taken}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=sentencepiece, unk_token=settings.get("unk_token")))
    if sentencepiece:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        if settings.get("add_bos_token") or settings.get("processor_class") == "MLlavaProcessor":
            begin = settings["bos_token"]
            special = [(begin, vocabulary[begin])]
            tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=special)
    tokenizer.add_special_tokens([added[number] for number in sorted(added)])
    return tokenizer


def _bytelevel() -> Iterator[str | tuple[str, str]]:
    yield from sorted(pre_tokenizers.ByteLevel.alphabet())
    yield from _words("Ġ")


def _sentencepiece() -> Iterator[str | tuple[str, str]]:
    yield from (f"<0x{byte:02X}>" for byte in range(256))
    yield from ["▁", *(chr(code) for code in range(33, 127))]
    yield from _words("▁")


def _words(space: str) -> Iterator[tuple[str, str]]:
    seen = set[str]()
    for word in _WORDS:
        for end in range(1, len(word) + 1):
            merged = space + word[:end]
            if merged not in seen:
                seen.add(merged)
                yield (merged[:-1], merged[-1])
