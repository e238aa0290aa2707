"""Write the adapters of this folder with peft, and what peft makes of them: `python make_adapters.py`, where peft is installed.

The base is the tiny Qwen2-VL of the tests. What merging adds to a matrix does not depend on the base, so a corner of that is kept.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import model_folder, qwen2_vl_config
from transformers import Qwen2VLForConditionalGeneration

HERE = Path(__file__).parent
CORNER = 6
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": r".*(language_model\.layers\.[01]\.(self_attn\.[qv]_proj|mlp\.down_proj)|visual\.blocks\.0\.attn\.qkv)",
    },
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": True,
        "fan_in_fan_out": True,  # peft ignores it for linear layers
        "target_modules": ["k_proj", "o_proj"],
        "layers_to_transform": [1, 2],
        "rank_pattern": {"k_proj": 3},
        "alpha_pattern": {r"layers\.2\.self_attn\.k_proj": 9, "o_proj": 5},
    },
    "whole": {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens"], "modules_to_save": ["model.language_model.norm"]},
}


def main() -> None:
    """Write each adapter with random factors, and expected.json with the corners of what merging adds."""
    for number, (name, settings) in enumerate(ADAPTERS.items()):
        with tempfile.TemporaryDirectory() as place:
            base = model_folder(Path(place), Qwen2VLForConditionalGeneration, qwen2_vl_config({}))
            write(base, HERE / name, LoraConfig(**settings), number)


def write(base: Path, folder: Path, settings: Any, seed: int) -> None:
    """Write one adapter."""
    model = get_peft_model(Qwen2VLForConditionalGeneration.from_pretrained(base), settings)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    shutil.rmtree(folder, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = "maker/tiny-VL"
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    plain = Qwen2VLForConditionalGeneration.from_pretrained(base)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    merged = PeftModel.from_pretrained(plain, folder).merge_and_unload().state_dict()
    added = {name: tensor - before[name] for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    corners = {
        name: {"sum": float(tensor.abs().sum()), "corner": tensor[:CORNER, :CORNER].tolist()}
        for name, tensor in added.items()
        if tensor.dim() == 2
    }
    (folder / "expected.json").write_text(json.dumps(corners, indent=1) + "\n")


if __name__ == "__main__":
    main()
