"""Build the decoder of a true-size model, with cuts at every site, through NVIDIA's parser and builder: no GPU is needed.

    python examples/builds/decoder.py OUT --layers 24 --target jetpack6 --precision fp16

The model has the shape of Qwen2-VL over a 0.5B language model and random weights: building looks at shapes alone. Prints seconds,
peak memory and sizes of both steps as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from edgeprune.bundle import DECODER
from edgeprune.bundle.graph_io import ROWS
from edgeprune.export.tracing import trace_decoder
from edgeprune.families.qwen2_vl import Qwen2VL
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits, decoder_ranges, shapes_of
from edgeprune.runtime.backends.tensorrt.trial import substitute_capability, try_build
from edgeprune.targets import PRECISIONS, TARGETS, Lowering

GEOMETRY = Geometry(height=672, width=672, patch=14, merge=2)  # 576 visual tokens


def main() -> None:
    """Export, build, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--target", choices=[name for name in TARGETS if TARGETS[name].tensorrt], default="jetpack6")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16")
    request = parser.parse_args()
    request.out.mkdir(parents=True, exist_ok=True)
    lowering = Lowering(TARGETS[request.target], request.precision)
    path = request.out / Path(DECODER).name
    plan = cuts(request.layers)
    started = time.perf_counter()
    record = trace_decoder(decoder(request.layers, request.vocabulary).decoder(), 3, plan, lowering, path)
    exported = time.perf_counter() - started
    profiles = []
    for ranges in decoder_ranges((plan,), ProfileLimits(), steps=ROWS in record.inputs):
        dynamic = {name: at.shape for name, at in record.inputs.items() if any(isinstance(axis, str) for axis in at.shape)}
        profiles.append({name: shapes_of(shape, ranges) for name, shape in dynamic.items()})
    trial = try_build(path, DECODER, profiles, substitute_capability(lowering.target))
    weights = sum(file.stat().st_size for file in request.out.glob(f"{path.name}*"))
    print(
        json.dumps(
            {
                "error": trial.error,
                "export seconds": round(exported, 1),
                "graph MB": round(weights / 1e6),
                "parse seconds": round(trial.parse_seconds, 2),
                "build seconds": round(trial.build_seconds, 1),
                "peak GB": round(trial.peak_bytes / 1e9, 2),
                "engine MB": round(trial.plan_bytes / 1e6),
            },
            indent=2,
        )
    )


def cuts(layers: int) -> KeepPlan:
    """Return a plan of two layer cuts, a cache cut in every layer and a fixed decode schedule."""
    base = unpruned_plan("qwen2_vl", layers, GEOMETRY)
    first, second = max(layers // 8, 1), max(layers // 2, 2)
    alive = [576 if layer < first else 288 if layer < second else 144 for layer in range(layers)]
    return base.with_cuts(
        Cut("layer", "fastv", 288, layer=first),
        Cut("layer", "pyramiddrop", 144, layer=second),
        *(Cut("cache", "plphp", tokens // 2, layer) for layer, tokens in enumerate(alive)),
        Cut("decode", "dyrate", 0, options={"form": "schedule", "steps": [8], "shares": [0.5]}),
    )


def decoder(layers: int, vocabulary: int) -> Qwen2VL:
    """Return a model of random weights: 14 heads on 2 KV heads of 64, hidden 896."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": layers,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    }
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 896, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2}
    torch.manual_seed(0)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return Qwen2VL(Qwen2VLForConditionalGeneration(config).eval())


if __name__ == "__main__":
    main()
