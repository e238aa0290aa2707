"""Model folders quantized to the layouts of GPTQ and AWQ by rounding to the nearest: what such a checkpoint holds, and its weights.

The layouts are written down here a second time, from their documentation; `test_packed.py` compares both with GPTQModel's tensors.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LAYERS = r"layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight$"  # of the decoder, as all published checkpoints
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Scheme:
    """A quantization: `group` inputs share a scale (0: all), `shuffled`: groups out of order, as with desc_act."""

    method: str = "gptq"
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    shuffled: bool = False
    layout: str = ""

    def settings(self) -> dict[str, Any]:
        """Return the quantization_config of config.json."""
        common = {"quant_method": self.method, "bits": self.bits, "group_size": self.group or -1}
        if self.method == "awq":
            return {**common, "version": "gemm", "zero_point": True, "modules_to_not_convert": ["visual"]}
        layout = {"checkpoint_format": self.layout} if self.layout else {}
        return {**common, **layout, "sym": self.symmetric, "desc_act": self.shuffled, "true_sequential": True}

    def packed(self, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the tensors of a layer with the weight [out, in], and the weight that they stand for in float32."""
        inputs, most = weight.shape[1], (1 << self.bits) - 1
        group_of = torch.arange(inputs) // (self.group or inputs)
        if self.shuffled:
            group_of = group_of[torch.randperm(inputs, generator=torch.Generator().manual_seed(0))]
        members = [weight[:, group_of == group] for group in range(int(group_of.max()) + 1)]
        high = torch.stack([part.amax(dim=1).clamp(min=0) for part in members])  # [groups, out]
        low = torch.stack([part.amin(dim=1).clamp(max=0) for part in members])
        span = 2 * torch.maximum(high, -low) if self.symmetric else high - low
        scales = (span / most).clamp(min=1e-4).half()
        zeros = torch.full_like(scales, 1 << (self.bits - 1)) if self.symmetric else (-low / scales).round().clamp(0, most)
        zeros = zeros.int()
        integers = (weight.T / scales[group_of].float()).round().int() + zeros[group_of]
        integers = integers.clamp(0, most)  # [in, out]
        restored = ((integers - zeros[group_of]).float() * scales[group_of].float()).T
        if self.method == "awq":
            parts = {"qweight": self._pack(integers, _AWQ_ORDER), "qzeros": self._pack(zeros, _AWQ_ORDER), "scales": scales}
            return parts, restored
        stored = zeros if self.layout == "gptq_v2" else (zeros - 1) & most
        order = tuple(range(32 // self.bits))
        parts = {"qweight": self._pack(integers.T, order).T.contiguous(), "qzeros": self._pack(stored, order), "scales": scales}
        return parts | {"g_idx": group_of.int()}, restored

    def _pack(self, integers: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
        # Columns become words; place i of a word holds column order[i].
        words = integers.long().reshape(len(integers), -1, len(order))[:, :, list(order)]
        summed = (words << (self.bits * torch.arange(len(order)))).sum(dim=2)
        return torch.where(summed >= 1 << 31, summed - (1 << 32), summed).int()


def quantize_folder(folder: Path, scheme: Scheme, layers: str = LAYERS) -> dict[str, torch.Tensor]:
    """Quantize a folder in place; return the weights that its quantized layers stand for, by the names of the tensors."""
    tensors, restored = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, tensor in load_file(folder / "model.safetensors").items():
        if re.search(layers, name):
            parts, restored[name] = scheme.packed(tensor.float())
            tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme.settings()}))
    return restored
