"""Manifests of bundles, and the folder that they describe."""

from __future__ import annotations

import json

from edgeprune.bundle import (
    CHAT_TEMPLATE,
    DECODER,
    EMBED,
    MANIFEST,
    PLAN,
    PREPROCESSOR,
    SPECIAL_TOKENS,
    TOKENIZER,
    VISION,
    Bundle,
    DecoderShape,
    GenerationDefaults,
    GraphRecord,
    ImageText,
    Manifest,
    Source,
    Tensor,
    tier_plan,
)
from edgeprune.bundle.integrity import record_files
from edgeprune.plan import Cut, Geometry
from edgeprune.plan.presets import unpruned_plan
from fuzz.conforming import check_type
from fuzz.files import in_file, scratch
from fuzz.mutations import json_variant
from fuzz.target import Target, demand

_GRAPH = GraphRecord({"pixel_values": Tensor("float32", (4, 588))}, {"tokens": Tensor("float32", (1, "tokens", 8))})
_FILES = (VISION, EMBED, DECODER, f"{DECODER}.data", TOKENIZER, SPECIAL_TOKENS, CHAT_TEMPLATE, PREPROCESSOR)


def _load(data: bytes) -> bool:
    in_file(data, MANIFEST)
    manifest = Manifest.load(scratch())
    check_type(manifest, Manifest, "the manifest")
    demand(manifest.decoder.width >= 1, "a decoder without a width")
    bundle = Bundle.load(scratch())
    demand(bundle.tier(None) == 0 and len(bundle.tiers) == len(manifest.tiers), "a tier that is lost")
    demand(manifest.lowering.precision == manifest.precision, "another precision")
    return True


def manifests() -> Target:
    """Return the target of manifest.json, in a folder that has the files of a bundle."""
    plan = unpruned_plan("qwen2_vl", 2, Geometry(28, 28, 14, 1)).with_cuts(Cut("layer", "fastv", 3, 1))
    lower = unpruned_plan("qwen2_vl", 2, Geometry(28, 28, 14, 1)).with_cuts(Cut("layer", "fastv", 2, 1))
    for folder in ("onnx", "processor", "tiers"):
        (scratch() / folder).mkdir(exist_ok=True)
    for name in _FILES:
        (scratch() / name).write_bytes(name.encode())
    plan.save(scratch() / PLAN)
    lower.save(scratch() / tier_plan("fast"))
    files, seeds = record_files(scratch(), MANIFEST), []
    for names in ((), ("quality", "fast")):
        Manifest(
            source=Source("a model", "qwen2_vl", "ab" * 32),
            decoder=DecoderShape(2, 1, 8, 8, 300, 3, 256),
            target="onnxruntime",
            precision="fp32",
            encoder_blocks=2,
            image=ImageText("image", "<image>", "<image>", 9),
            end_tokens=(2, 5),
            generation=GenerationDefaults(1.05, (7,)),
            versions={"torch": "2.13.0"},
            graphs={VISION: _GRAPH, DECODER: _GRAPH},
            files=files,
            tiers=names,
        ).save(scratch())
        text = (scratch() / MANIFEST).read_text(encoding="utf-8")
        seeds.append(json.dumps(json.loads(text)).encode())
    return Target(_load, tuple(seeds), json_variant)
