"""Folders that people have and that are not read: each is refused by name with what to take instead, before torch is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from edgeprune.checkpoint import formats
from edgeprune.checkpoint.loading import load_model, resolve_model
from edgeprune.errors import EdgePruneError, UnsupportedModelError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change(folder: Path, name: str = CONFIG, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))


def config(**values: Any) -> Callable[[Path], object]:
    return lambda folder: change(folder, **values)


def renamed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


def gguf(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "tiny-Q4_K_M.gguf")
    (folder / "README.md").write_text("---\nlicense: other\nbase_model:\n- maker/tiny-VL\n---\n")


def mlx(folder: Path) -> None:
    change(folder, quantization={"group_size": 64, "bits": 4})
    (folder / "README.md").write_text('---\nbase_model: "maker/tiny-VL"\n---\n')


def half(folder: Path) -> None:
    downloads = folder / ".cache/huggingface/download"
    downloads.mkdir(parents=True)
    (folder / WEIGHTS).rename(downloads / "x.4d7a.incomplete")


def lacking(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))


def llava_1_5(folder: Path) -> None:
    settings = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu"}
    (folder / CONFIG).write_text(json.dumps(settings))


def mistral(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")
    (folder / CONFIG).rename(folder / "params.json")


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
AUTO_MAP = {"AutoConfig": "configuration_tiny.TinyConfig"}
# What is done to a folder, words of the message, words of the remedy.
REFUSED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "GGUF": (gguf, "is GGUF, the format of llama.cpp", "the original safetensors checkpoint: maker/tiny-VL."),
    "InternVL of its authors": (
        config(model_type="internvl_chat", auto_map=AUTO_MAP),
        "in the original layout of its authors (model_type 'internvl_chat')",
        "the repository of the same name with -hf",
    ),
    "LLaVA of its authors": (config(model_type="llava_llama"), "(model_type 'llava_llama')", "https://huggingface.co/llava-hf"),
    "LLaVA-OneVision of its authors": (config(model_type="llava_qwen"), "(model_type 'llava_qwen')", "huggingface.co/llava-hf"),
    "LLaVA 1.5 of its authors": (
        llava_1_5,
        "in the original layout of its authors",
        "https://huggingface.co/llava-hf",
    ),
    "MiniCPM-V": (config(model_type="minicpmv", auto_map=AUTO_MAP), "'minicpmv' need code of their own", "Supported: "),
    "Phi-3.5-vision": (config(model_type="phi3_v", auto_map=AUTO_MAP), "'phi3_v' need code of their own", "Supported: "),
    "a type that is not exported": (config(model_type="mllama"), "'mllama' are not supported", "Supported: "),
    "bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "is quantized with bitsandbytes",
        "in BF16 or FP16",
    ),
    "FP8": (config(quantization_config=FP8), "is quantized with fp8", "in BF16 or FP16"),
    "compressed-tensors": (
        config(quantization_config={"quant_method": "compressed-tensors", "format": "float-quantized"}),
        "is quantized with compressed-tensors",
        "in BF16 or FP16",
    ),
    "MLX": (mlx, "is quantized with MLX", "in BF16 or FP16: maker/tiny-VL."),
    "half a download": (half, "is half a download: x.4d7a.incomplete", "Run the same download again"),
    "a partial file": (renamed(f"{WEIGHTS}.part"), f"is half a download: {WEIGHTS}.part", "Run the same download again"),
    "a missing shard": (lacking, "lacks 1 of the 2 files", "the same download goes on where it stopped"),
    "a pointer of git-lfs": (
        lambda folder: (folder / WEIGHTS).write_text(POINTER),
        f"{WEIGHTS} in ",
        "lfs pull",
    ),
    "another pointer": (
        lambda folder: (folder / "tokenizer.json").write_text(POINTER),
        "tokenizer.json in ",
        "lfs pull",
    ),
    "pickles": (renamed("pytorch_model.bin"), "no safetensors weights; pickle", "save_pretrained"),
    "Mistral's layout": (mistral, "it is not in transformers' layout", "for transformers"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "neither model.safetensors nor", "Download the whole checkpoint"),
    "the processor of another model": (
        lambda folder: change(folder, "processor_config.json", processor_class="LlavaProcessor"),
        "of type 'qwen2_vl' with the processor of another: LlavaProcessor",
        "whose processor is Qwen2VLProcessor",
    ),
    "the image processor of another model": (
        lambda folder: change(folder, "preprocessor_config.json", image_processor_type="CLIPImageProcessor"),
        "of type 'qwen2_vl' with the processor of another: CLIPImageProcessor",
        "whose processor is Qwen2VLProcessor",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_is_named_with_what_to_take(kind: str, folder: Path) -> None:
    spoil, words, remedy = REFUSED[kind]
    spoil(folder)
    started = time.perf_counter()
    with pytest.raises(EdgePruneError) as caught:
        resolve_model(str(folder))
    assert time.perf_counter() - started < 1
    assert words in caught.value.message and remedy in caught.value.hint, str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1


ALL = """
import sys
from edgeprune.checkpoint.loading import resolve_model
from edgeprune.errors import EdgePruneError
for name in sys.argv[1:]:
    try:
        resolve_model(name)
        print("taken:", name)
    except EdgePruneError:
        pass
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""


def test_no_refusal_needs_torch(tiny_folder: Path, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(tiny_folder, tmp_path / str(number))) for number in range(len(REFUSED))]
    for folder, (spoil, _, _) in zip(folders, REFUSED.values(), strict=True):
        spoil(folder)
    ran = subprocess.run([sys.executable, "-c", ALL, *map(str, folders)], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_a_file_of_llama_cpp_is_named(tmp_path: Path) -> None:
    path = tmp_path / "Qwen2.5-VL-3B-Instruct-Q4_K_M.gguf"
    path.touch()
    with pytest.raises(UnsupportedModelError, match=r"is GGUF.*the original safetensors checkpoint"):
        resolve_model(str(path))


def test_hf_repositories_of_original_ones_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"for transformers: OpenGVLab/InternVL3-1B-hf\."):
        formats.check_config("OpenGVLab/InternVL3-1B", Path(), {"model_type": "internvl_chat"})
    with pytest.raises(UnsupportedModelError, match=r", the one named unsloth/Qwen2\.5-VL-3B-Instruct\."):
        formats.check_config(
            "unsloth/Qwen2.5-VL-3B-Instruct-unsloth-bnb-4bit",
            Path(),
            {"model_type": "qwen2_5_vl", "quantization_config": {"quant_method": "bitsandbytes"}},
        )


def test_processors_of_the_families_are_those_of_transformers() -> None:
    for family, names in formats._PROCESSORS.items():
        found = formats._PROCESSOR_NAME.fullmatch(PROCESSOR_MAPPING_NAMES[family])
        assert found is not None and found[1] == names[0]
        for processor in IMAGE_PROCESSOR_MAPPING_NAMES[family].values():
            formats.check_processor("a", family, [processor])


def test_only_files_that_are_loaded_count(folder: Path) -> None:
    expected, size = resolve_model(str(folder)).source(), resolve_model(str(folder)).bytes
    for stray in ("adapter_model.safetensors", "consolidated.safetensors", "model-00001-of-00001.safetensors"):
        save_file({"x": torch.zeros(4)}, folder / stray)
    (folder / "tiny.gguf").touch()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}}))
    found = resolve_model(str(folder))
    assert (found.source().weights_sha256, found.bytes) == (expected.weights_sha256, size)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_native_type_needs_neither_code_nor_architectures(folder: Path, on_disk: bool) -> None:
    (folder / "ours.py").write_text("raise SystemExit('this code must not run')\n")
    change(folder, auto_map={"AutoConfig": "ours.Config", "AutoModelForImageTextToText": "ours.Model"}, architectures=None)
    change(folder, "preprocessor_config.json", auto_map={"AutoImageProcessor": "ours.Images", "AutoProcessor": "ours.Processor"})
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["ours.Tokenizer", None]})
    loaded = load_model(resolve_model(str(folder)), on_disk=on_disk)
    assert type(loaded.model).__name__ == "Qwen2VLForConditionalGeneration"
    assert len(loaded.family.decoder().layers) == 3
