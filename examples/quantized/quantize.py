"""Quantize the bundled model with GPTQModel or AutoRound, on a CPU, to a checkpoint that `edgeprune export` takes as it is.

python examples/quantized/quantize.py gptq OUT
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses fewer

import transformers

from edgeprune.checkpoint.processor import load_processor
from edgeprune.tabletop import MODEL_FOLDER
from edgeprune.tabletop.dataset import scenes
from edgeprune.tabletop.drawing import draw_scene

SCENES, SEED, QUESTIONS = 32, 7, 4  # of the calibration: scenes, and questions about each
GPTQ: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "desc_act": False},
    "gptq-act-order": {"bits": 4, "desc_act": True},
    "gptq-int8": {"bits": 8, "desc_act": False},
}


def main() -> None:
    """Quantize and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=[*GPTQ, "awq"])
    parser.add_argument("out")
    request = parser.parse_args()
    if request.method == "awq":
        quantize_by_rounding(request.out)
    else:
        quantize_by_gptq(request.out, GPTQ[request.method])


def quantize_by_gptq(out: str, settings: dict[str, Any]) -> None:
    """Quantize symmetrically with GPTQ's calibration."""
    # AutoProcessor would need torchvision for videos, which the bundled model does not take.
    transformers.AutoProcessor.from_pretrained = lambda path, **_: load_processor(Path(path), "qwen2_vl")
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(group_size=128, sym=True, offload_to_disk=False, device="cpu", **settings)
    model = GPTQModel.load(str(MODEL_FOLDER), config)
    model.quantize(conversations(), batch_size=1)
    model.save(out)


def quantize_by_rounding(out: str) -> None:
    """Round to the nearest with zero points, and write AWQ's layout; AWQ's own search for scales needs a GPU."""
    from auto_round import AutoRound

    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(MODEL_FOLDER, dtype="float32")
    tokenizer = load_processor(MODEL_FOLDER, "qwen2_vl").tokenizer
    rounding = {"iters": 0, "disable_opt_rtn": True}
    quantizer = AutoRound(model, tokenizer=tokenizer, bits=4, group_size=128, sym=False, device_map="cpu", **rounding)
    quantizer.quantize_and_save(out, format="auto_awq")


def conversations() -> list[list[dict[str, Any]]]:
    """Return questions about scenes with their answers, as messages."""
    found: list[list[dict[str, Any]]] = []
    for scene, questions in scenes(SEED, SCENES):
        image = draw_scene(scene).convert("RGB")
        for question in questions[:QUESTIONS]:
            asked: list[Any] = [{"type": "image", "image": image}, {"type": "text", "text": question.prompt}]
            answered: list[Any] = [{"type": "text", "text": question.answer}]
            found.append([{"role": "user", "content": asked}, {"role": "assistant", "content": answered}])
    return found


if __name__ == "__main__":
    main()
