"""Export checkpoints of Qwen2-VL's shape from 0.25B to 8B parameters, and report time, peak memory and size of the bundle.

    python examples/sizes/sizes.py OUT --precision int4 --size 0.25B --size 2B
    python examples/sizes/sizes.py OUT --precision int4 --gptq

With --gptq, the decoder's layers are quantized in the checkpoint. Weights are meaningless: exporting looks at shapes alone.
Checkpoints and bundles are deleted as soon as they are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import numpy as np

from edgeprune.tabletop import MODEL_FOLDER
from edgeprune.targets import PRECISIONS

EXPORT = "from edgeprune.cli import main; main()"
REQUEST = ("--image-size", "448x448", "--method", "fastv", "--keep", "0.5", "--layer", "2")
GROUP = 128  # inputs that share a scale in a GPTQ checkpoint
BYTES = {"BF16": 2, "F16": 2, "I32": 4}
Shapes = dict[str, tuple[str, tuple[int, ...]]]  # safetensors' name of the type, and the shape


@dataclass(frozen=True)
class Size:
    """The numbers of a Qwen2-VL: of the decoder, and of the vision tower with its `depth`, `width` and heads."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    depth: int
    width: int
    vision_heads: int


SIZES = {
    "0.25B": Size(640, 3456, 12, 10, 2, 151936, True, 16, 512, 8),
    "0.5B": Size(896, 4864, 24, 14, 2, 151936, True, 16, 512, 8),
    "2B": Size(1536, 8960, 28, 12, 2, 151936, True, 32, 1280, 16),  # Qwen2-VL-2B
    "4B": Size(2048, 11008, 36, 16, 2, 151936, True, 32, 1280, 16),
    "8B": Size(3584, 18944, 28, 28, 4, 152064, False, 32, 1280, 16),  # Qwen2-VL-7B, which has 8.3B
}


@dataclass(frozen=True)
class Row:
    """What one export took: billions of parameters, seconds, and GB of peak memory, checkpoint and bundle."""

    size: str
    parameters: float
    checkpoint: float
    seconds: float
    memory: float
    bundle: float


def main() -> None:
    """Write, export, measure, delete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--precision", choices=PRECISIONS, default="int4")
    parser.add_argument("--gptq", action="store_true", help="Checkpoints whose decoder layers GPTQ has quantized to 4 bits.")
    parser.add_argument("--size", action="append", choices=list(SIZES), help="Repeatable.  [default: all]")
    request = parser.parse_args()
    request.out.mkdir(parents=True, exist_ok=True)
    print("size   parameters  checkpoint   seconds  peak memory    bundle", flush=True)
    rows = []
    for name in request.size or SIZES:
        row = measured(name, request.precision, request.out, gptq=request.gptq)
        print(
            f"{name:<6} {row.parameters:>9.2f}B {row.checkpoint:>8.2f} GB {row.seconds:>9.1f} {row.memory:>9.2f} GB "
            f"{row.bundle:>6.2f} GB",
            flush=True,
        )
        rows.append(row)
    slopes = fitted(rows)
    print("\n".join(f"{what}: {slope:.3g} per billion parameters" for what, slope in slopes.items()))
    report = {
        "precision": request.precision,
        "gptq": request.gptq,
        "request": REQUEST,
        "rows": [asdict(row) for row in rows],
        "slopes": slopes,
    }
    (request.out / "sizes.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measured(name: str, precision: str, out: Path, *, gptq: bool = False) -> Row:
    """Export one size; nothing is left of it."""
    model, bundle = out / f"{name}.model", out / f"{name}.bundle"
    try:
        parameters = write_model(SIZES[name], model, gptq=gptq)
        command = [
            sys.executable,
            "-c",
            EXPORT,
            "export",
            str(model),
            "-o",
            str(bundle),
            "--precision",
            precision,
            "--json",
            *REQUEST,
        ]
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{name}: export ended with {child.returncode}.")
        return Row(name, parameters / 1e9, size_of(model), seconds, usage.ru_maxrss * 1024 / 1e9, size_of(bundle))
    finally:
        shutil.rmtree(model, ignore_errors=True)
        shutil.rmtree(bundle, ignore_errors=True)


def size_of(folder: Path) -> float:
    """Return the size of a folder in GB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def fitted(rows: list[Row]) -> dict[str, float]:
    """Return the slopes of straight lines through the measurements."""
    if len(rows) < 2:
        return {}
    at = [row.parameters for row in rows]
    columns = {"seconds": "seconds", "GB of peak memory": "memory", "GB of bundle": "bundle"}
    return {what: float(np.polyfit(at, [getattr(row, key) for row in rows], 1)[0]) for what, key in columns.items()}


def write_model(size: Size, folder: Path, *, gptq: bool = False) -> int:
    """Write a transformers folder with weights in bf16, or partly in 4 bits; return how many numbers they are."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL_FOLDER / name, folder)
    processor = json.loads((MODEL_FOLDER / "preprocessor_config.json").read_text(encoding="utf-8"))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"patch_size": 14, "merge_size": 2}))
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
    (folder / "config.json").write_text(json.dumps(config(size) | ({"quantization_config": settings} if gptq else {})))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    shapes = dict(tensors(size))
    stored: Shapes = {}
    for name, shape in shapes.items():
        packed = gptq and name.startswith("model.layers.") and len(shape) == 2
        stored |= packed_tensors(name.removesuffix("weight"), *shape) if packed else {name: ("BF16", shape)}
    write_weights(stored, folder / "model.safetensors")
    return sum(prod(shape) for shape in shapes.values())


def config(size: Size) -> dict[str, object]:
    """Return the config.json."""
    shipped = json.loads((MODEL_FOLDER / "config.json").read_text(encoding="utf-8"))
    head = size.hidden // size.heads
    text = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [head // 8, head * 3 // 16, head * 3 // 16],
        },
    }
    vision = {"depth": size.depth, "embed_dim": size.width, "hidden_size": size.hidden, "num_heads": size.vision_heads}
    tokens = {name: value for name, value in shipped.items() if name.endswith("_token_id")}
    return {
        "architectures": shipped["architectures"],
        "model_type": shipped["model_type"],
        "dtype": "bfloat16",
        "tie_word_embeddings": size.tied,
        "text_config": text | {"model_type": "qwen2_vl_text", "bos_token_id": 0, "eos_token_id": 2},
        "vision_config": vision | {"model_type": "qwen2_vl", "patch_size": 14, "spatial_merge_size": 2},
        **tokens,
    }


def tensors(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes, as they are in Qwen2-VL's own checkpoints."""
    keys = size.hidden // size.heads * size.kv_heads
    yield "model.embed_tokens.weight", (size.vocabulary, size.hidden)
    if not size.tied:
        yield "lm_head.weight", (size.vocabulary, size.hidden)
    yield "model.norm.weight", (size.hidden,)
    for layer in range(size.layers):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{name}.weight", (size.hidden,)
        for name, outputs in (("q_proj", size.hidden), ("k_proj", keys), ("v_proj", keys)):
            yield from linear(f"{at}self_attn.{name}", outputs, size.hidden)
        yield f"{at}self_attn.o_proj.weight", (size.hidden, size.hidden)
        yield f"{at}mlp.gate_proj.weight", (size.intermediate, size.hidden)
        yield f"{at}mlp.up_proj.weight", (size.intermediate, size.hidden)
        yield f"{at}mlp.down_proj.weight", (size.hidden, size.intermediate)
    yield from vision_tensors(size)


def vision_tensors(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield those of the vision tower."""
    yield "visual.patch_embed.proj.weight", (size.width, 3, 2, 14, 14)
    for block in range(size.depth):
        at = f"visual.blocks.{block}."
        for name in ("norm1", "norm2"):
            yield from norm(at + name, size.width)
        for name, outputs, inputs in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            yield from linear(at + name, outputs * size.width, inputs * size.width)
    yield from norm("visual.merger.ln_q", size.width)
    yield from linear("visual.merger.mlp.0", 4 * size.width, 4 * size.width)
    yield from linear("visual.merger.mlp.2", size.hidden, 4 * size.width)


def linear(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of a linear layer."""
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of a layer norm."""
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def packed_tensors(layer: str, outputs: int, inputs: int) -> Shapes:
    """Return the tensors of a linear layer that GPTQ has quantized."""
    groups = inputs // GROUP
    return {
        f"{layer}qweight": ("I32", (inputs // 8, outputs)),
        f"{layer}qzeros": ("I32", (groups, outputs // 8)),
        f"{layer}scales": ("F16", (groups, outputs)),
        f"{layer}g_idx": ("I32", (inputs,)),
    }


def write_weights(shapes: Shapes, path: Path) -> None:
    """Write a safetensors file of small random numbers, tensor by tensor."""
    header, offset = {}, 0
    for name, (kind, shape) in shapes.items():
        end = offset + BYTES[kind] * prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    drawn = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02
    numbers = (drawn.view(np.uint32) >> 16).astype(np.uint16)  # bf16 is the first half of float32
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (kind, shape) in shapes.items():
            if name.endswith("qzeros"):
                file.write(np.full(shape, 0x77777777, np.int32).data)  # 8, less one
            elif name.endswith("g_idx"):
                file.write((np.arange(shape[0], dtype=np.int32) // GROUP).data)
            elif name.endswith("scales"):
                file.write(np.full(shape, 0.002, np.float16).data)
            else:
                whole, rest = divmod(BYTES[kind] // 2 * prod(shape), len(numbers))
                for _ in range(whole):
                    file.write(numbers.data)
                file.write(numbers[:rest].data)


if __name__ == "__main__":
    main()
