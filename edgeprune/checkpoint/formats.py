"""Which files of a folder are its weights, and formats that are not read: each is refused by name, with what to take instead.

Judges by file names and JSON alone, before torch is imported and before the weights of a model of the hub are downloaded.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import UnsupportedModelError, UsageError
from edgeprune.io.files import is_file
from edgeprune.registry import FAMILIES, check_family

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GGUF = ".gguf"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PARTIAL, _PICKLES = (".incomplete", ".part", ".crdownload"), (".bin", ".pth", ".pt", ".ckpt")
_POINTER = b"version https://git-lfs"
_BASE = re.compile(r"^base_model:\s*(?:\n\s*-\s*)?[\"']?([\w.-]+/[\w.-]+)", re.MULTILINE)  # in the head of a model card
_CODED = re.compile(r"[-_.](unsloth-bnb-4bit|bnb-[48]bit|gguf|fp8(-\w+)?|mlx.*|[48]bit)/?$", re.IGNORECASE)
# The layouts of quantized layers that are read, the default first, and the settings that name them.
_LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
_LAYOUT_SETTINGS = {"gptq": ("checkpoint_format", "format"), "awq": ("version", "format", "checkpoint_format")}
# Types of original repositories, in a layout that transformers does not read, with where the others are.
_ORIGINAL = {
    "internvl_chat": "the repository of the same name with -hf at its end",
    "llava_llama": "the one of llava-hf: https://huggingface.co/llava-hf",
    "llava_mistral": "the one of llava-hf: https://huggingface.co/llava-hf",
    "llava_qwen": "the one of llava-hf: https://huggingface.co/llava-hf",
}
# Whose processors each family takes, by their names without "Processor" and "ImageProcessor". Other names are left to transformers.
_PROCESSORS = {
    "idefics2": ("Idefics2",),
    "idefics3": ("Idefics3", "SmolVLM"),
    "internvl": ("InternVL", "GotOcr2"),
    "llava": ("Llava", "CLIP", "Pixtral", "Siglip"),
    "llava_next": ("LlavaNext",),
    "llava_onevision": ("LlavaOnevision",),
    "mistral3": ("Pixtral",),
    "paligemma": ("PaliGemma", "Siglip"),
    "qwen2_5_vl": ("Qwen2_5_VL", "Qwen2VL"),
    "qwen2_vl": ("Qwen2VL", "Qwen2_5_VL"),
    "qwen3_vl": ("Qwen3VL", "Qwen2VL"),
    "smolvlm": ("SmolVLM", "Idefics3"),
    "vipllava": ("Llava", "CLIP"),
}
_PROCESSOR_NAME = re.compile(r"(\w+?)(?:Image)?Processor(?:Fast|Pil)?")


@dataclass(frozen=True)
class Packing:
    """How a checkpoint packs its quantized layers: `method` ("gptq" or "awq"), and its `layout`, such as gptq_v2 or gemm."""

    method: str
    layout: str


def packing_of(name: str, folder: Path, config: Mapping[str, Any]) -> Packing | None:
    """Return how the checkpoint with the contents of config.json packs quantized layers, None if it holds none.

    Bits, groups and which layers are quantized follow from the tensors themselves. Raises UnsupportedModelError for a method or a
    layout that is not read.
    """
    mlx, text = config.get("quantization"), config.get("text_config")
    if isinstance(mlx, Mapping) and "group_size" in mlx:
        raise _quantized(name, folder, "MLX")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    settings = config.get("quantization_config") or nested
    if not settings:
        return None
    method = str(settings.get("quant_method", "an unnamed method") if isinstance(settings, Mapping) else settings).lower()
    if method not in _LAYOUTS:
        raise _quantized(name, folder, method)
    default, *_ = layouts = _LAYOUTS[method]
    named = next((settings[key] for key in _LAYOUT_SETTINGS[method] if settings.get(key)), default)
    layout = "marlin" if settings.get("is_marlin_format") else str(named).lower()
    if layout not in layouts:
        raise _quantized(name, folder, f"{method} in the layout {layout}")
    return Packing(method, layout)


def sizes_in(folder: Path) -> dict[str, int]:
    """Return the bytes of each file at the top of a folder; nothing for a folder that cannot be read."""
    with suppress(OSError):
        return {path.name: path.stat().st_size for path in folder.iterdir() if is_file(path)}
    return {}


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers loads: model.safetensors, else those in the index, sorted by name.

    Raises UnsupportedModelError if there are none, or not all of them.
    """
    return [folder / name for name in weight_names(str(folder), folder, sizes_in(folder))]


def weight_names(name: str, folder: Path, files: Collection[str]) -> list[str]:
    """Return the names of a model's weight files among its `files`, of which the index at least is in the folder.

    Raises UnsupportedModelError as `weight_files` does.
    """
    if _SINGLE in files:
        return [_SINGLE]
    if _INDEX not in files:
        raise _no_weights(name, folder, files)
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        shards = sorted({str(shard) for shard in index["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnsupportedModelError(f"Cannot read {folder / _INDEX}: {error}.") from error
    missing = [shard for shard in shards if shard not in files]
    if missing:
        raise UnsupportedModelError(
            f"{name} lacks {len(missing)} of the {len(shards)} files that its index names: {missing[0]}.",
            hint="Download the whole checkpoint: the same download goes on where it stopped.",
        )
    return shards


def check_files(name: str, folder: Path, files: Collection[str]) -> None:
    """Raise UnsupportedModelError for a folder of another format: GGUF, an adapter, an original layout, half a download."""
    whole = _SINGLE in files or _INDEX in files
    if not whole and any(file.endswith(GGUF) for file in files):
        raise gguf(name, folder)
    if not whole and ADAPTER_CONFIG in files:
        raise _adapter_alone(name, folder)
    if _CONFIG not in files and ("params.json" in files or "model_index.json" in files):
        raise UnsupportedModelError(
            f"{name} has no {_CONFIG}: it is not in transformers' layout.",
            hint="Take the repository of the model for transformers.",
        )
    if _CONFIG not in files:
        raise UsageError(f"{name} has no {_CONFIG}.", hint="Give a folder written by save_pretrained.")
    pointer = next((file for file in sorted(files) if _is_pointer(folder / file)), None)
    if pointer is not None:
        raise UnsupportedModelError(
            f"{pointer} in {name} is a pointer of git-lfs, not the file itself.",
            hint=f"Fetch it: git -C {_quoted(folder)} lfs pull",
        )


def check_config(name: str, folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for a config.json of a type, layout or quantization that is not read."""
    kind = str(config.get("model_type"))
    original = _ORIGINAL.get(kind)
    if kind == "llava" and "mm_vision_tower" in config and "text_config" not in config:  # LLaVA 1.5
        original = _ORIGINAL["llava_llama"]
    if kind == "internvl_chat" and HUB_ID.fullmatch(name):
        original = f"{name}-hf"
    if original is not None:
        raise UnsupportedModelError(
            f"{name} is in the original layout of its authors (model_type {kind!r}), which needs code of its own.",
            hint=f"Take the same model for transformers: {original}.",
        )
    if kind not in FAMILIES and "auto_map" in config:
        raise UnsupportedModelError(
            f"Models of type {kind!r} need code of their own and are not supported.",
            hint=f"Supported: {', '.join(sorted(FAMILIES))}.",
        )
    check_family(kind)
    packing_of(name, folder, config)


def check_processor(name: str, model_type: str, processors: Collection[str]) -> None:
    """Raise UnsupportedModelError if one of the processor classes that the files name is that of another family."""
    own, known = _PROCESSORS.get(model_type), {each for names in _PROCESSORS.values() for each in names}
    for processor in processors:
        found = _PROCESSOR_NAME.fullmatch(processor)
        if own is not None and found is not None and found[1] in known and found[1] not in own:
            raise UnsupportedModelError(
                f"{name} is a model of type {model_type!r} with the processor of another: {processor}.",
                hint=f"Copy the processor and tokenizer files of its own checkpoint, whose processor is {own[0]}Processor.",
            )


def gguf(name: str, folder: Path) -> UnsupportedModelError:
    """Return the error for a model in llama.cpp's format."""
    return UnsupportedModelError(
        f"{name} is GGUF, the format of llama.cpp.", hint=f"Take the original safetensors checkpoint{_base(name, folder)}."
    )


def base_option(base: object) -> str:
    """Return the name of an adapter's base model for a command: the weights that bitsandbytes was given, or BASE if unknown."""
    return _quoted(_CODED.sub("", base)) if isinstance(base, str) and base else "BASE"


def _adapter_alone(name: str, folder: Path) -> UnsupportedModelError:
    base = None
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    return UnsupportedModelError(
        f"{name} is an adapter of {base or 'a model that it does not name'}, not a model.",
        hint=f"Merge it: edgeprune export {base_option(base)} --adapter {_quoted(name)} -o BUNDLE",
    )


def _no_weights(name: str, folder: Path, files: Collection[str]) -> UnsupportedModelError:
    downloads = folder / ".cache" / "huggingface" / "download"  # beside what `hf download --local-dir` wrote
    partial = [file for file in (*files, *sizes_in(downloads)) if file.endswith(_PARTIAL)]
    if partial:
        return UnsupportedModelError(
            f"{name} is half a download: {partial[0]} is not whole yet.", hint="Run the same download again: it goes on."
        )
    if any(file.endswith(_PICKLES) for file in files):
        return UnsupportedModelError(
            f"{name} has no safetensors weights; pickle checkpoints are refused because loading one runs code.",
            hint="Convert it with save_pretrained in transformers.",
        )
    return UnsupportedModelError(
        f"{name} has no safetensors weights: neither {_SINGLE} nor {_INDEX}.", hint="Download the whole checkpoint."
    )


def _quantized(name: str, folder: Path, method: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is quantized with {method}, which is not read.",
        hint=f"Give a GPTQ or AWQ (gemm) checkpoint, or the original weights in BF16 or FP16{_base(name, folder)}.",
    )


def _base(name: str, folder: Path) -> str:
    # ": NAME", of the model card, or else of the name without what says how it was quantized.
    with suppress(OSError, UnicodeDecodeError):
        found = _BASE.search((folder / "README.md").read_text(encoding="utf-8"))
        if found is not None:
            return f": {found[1]}"
    plain = _CODED.sub("", name)
    return f", the one named {plain}" if plain != name else ""


def _is_pointer(path: Path) -> bool:
    with suppress(OSError):
        if path.suffix in (".safetensors", ".json") and path.stat().st_size < 1024:
            return path.read_bytes().startswith(_POINTER)
    return False


def _quoted(path: Path | str) -> str:
    return shlex.quote(str(path))
