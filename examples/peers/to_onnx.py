"""Write what transformers' own ONNX exporter makes of a checkpoint that answers about an image.

A folder for each part of an answer, and beside them what generate() needs: the processor, config.json, the table of embeddings.

python to_onnx.py CHECKPOINT IMAGE OUT fp32|int8
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

TABLE = "embeddings.safetensors"
# Linear layers by channel: the defaults take the table of embeddings too, and one scale for a whole matrix.
INT8 = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True}


def main(checkpoint: Path, image: Path, out: Path, precision: str) -> None:
    """Export the stages of generate(), and the parts that it runs before them, with ONNX Runtime's kernels for CPUs."""
    warnings.simplefilter("ignore")
    torch, transformers, exporters, splitting, pillow = map(
        import_module, ("torch", "transformers", "transformers.exporters", "transformers.exporters.utils", "PIL.Image")
    )
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    written = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = processor(images=[pillow.open(image).convert("RGB")], text=[written], add_special_tokens=False, return_tensors="pt")
    quantizer = exporters.OnnxRuntimeQuantizer(exporters.OnnxRuntimeDynamicConfig(**INT8)) if precision == "int8" else None
    config, exporter = exporters.OnnxConfig(dynamic=True, ort_fusions="cpu", quantizer=quantizer), exporters.OnnxExporter()
    # generate() encodes images before its first forward pass, where export_for_generation does not see them.
    stages = splitting.decompose_prefill_decode(model, dict(inputs))
    encoding, prefill = splitting.decompose_multimodal(model, dict(inputs)), splitting.decompose_multimodal(*stages["prefill"])
    parts = {**encoding, **prefill, "decode": stages["decode"]}
    for name, (module, given) in parts.items():
        exporter.export(module, given, config).save_pretrained(out / name)
    processor.save_pretrained(out)
    model.config.save_pretrained(out)
    table = model.get_input_embeddings().weight.detach().clone()
    import_module("safetensors.torch").save_file({"table": table}, out / TABLE)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
