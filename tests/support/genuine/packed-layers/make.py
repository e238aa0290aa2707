"""Pack made-up layers with GPTQModel's own code, and dequantize them with it: layers.safetensors, the reference of test_packed.py.

    pip install torch==2.13.0 transformers==5.23.0 && BUILD_CUDA_EXT=0 pip install --no-build-isolation gptqmodel==7.6.0
    python tests/support/genuine/packed-layers/make.py

Needs no GPU. EdgePrune does not need GPTQModel.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

INPUTS, OUTPUTS = 64, 24
# name: bits, group size, symmetric, inputs out of order, layout
LAYERS = {
    "gptq_int4": (4, 16, True, False, "gptq"),
    "gptq_int8": (8, 16, True, False, "gptq"),
    "gptq_int8_channel": (8, -1, True, False, "gptq"),
    "gptq_act_order": (4, 16, True, True, "gptq"),
    "gptq_asymmetric": (4, 32, False, False, "gptq"),
    "gptq_v2": (4, 32, False, False, "gptq_v2"),
    "gptq_v2_act_order": (8, 32, False, True, "gptq_v2"),
    "awq": (4, 16, False, False, "gemm"),
    "awq_channel": (4, -1, False, False, "gemm"),
}


def main() -> None:
    """Write layers.safetensors beside this file."""
    tensors = {}
    for number, (name, layer) in enumerate(LAYERS.items()):
        torch.manual_seed(number)
        for part, tensor in packed(*layer).items():
            tensors[f"{name}.{part}"] = tensor.contiguous()
    save_file(tensors, Path(__file__).with_name("layers.safetensors"))


def packed(bits: int, group_size: int, symmetric: bool, shuffled: bool, layout: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one layer as a checkpoint has them, and `weight`, what GPTQModel dequantizes them to [out, in]."""
    group = INPUTS if group_size == -1 else group_size
    shape = OUTPUTS, INPUTS // group
    zeros = torch.full(shape, 1 << (bits - 1)) if symmetric else torch.randint(0, 1 << bits, shape)
    scales = torch.rand(shape).half().float() * 0.01 + 0.001
    linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    torch.nn.init.normal_(linear.weight, std=0.02)
    kind = AwqTorchLinear if layout == "gemm" else TorchLinear
    layer = kind(
        bits=bits,
        group_size=group_size,
        sym=symmetric,
        desc_act=shuffled,
        in_features=INPUTS,
        out_features=OUTPUTS,
        register_buffers=True,
    )
    if layout == "gemm":
        # Its packing does not clamp: AutoAWQ chooses scales that cover the weights.
        scales = linear.weight.detach().view(OUTPUTS, -1, group).abs().amax(dim=2).mul(2 / 15).half().float()
        zeros = torch.full(shape, 8) - torch.randint(0, 2, shape)
        linear.weight.data.clamp_(min=-0.02, max=0.02)
        layer.pack(linear, scales, zeros)
        weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, bits, group)
        return {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales, "weight": weight.T}
    groups = torch.arange(INPUTS) // group
    layer.pack_original(linear, scales, zeros, (groups[torch.randperm(INPUTS)] if shuffled else groups).int())
    layer.qzero_format(format=2)
    weight = layer.dequantize_weight().T.half()
    if layout == "gptq":
        convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=group_size))
    parts = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    return parts | {"weight": weight}


if __name__ == "__main__":
    main()
