"""Weights as small integers: symmetric, zero point 0, as TensorRT takes them.

int8 has one scale for each output; int4 one for each output and block of 128 inputs (weight-only, the form that TensorRT and ONNX
Runtime multiply directly). A scale is not the largest weight's: of a few smaller ones, the one that leaves the least squared error,
as outliers are rare (the clipping search of Lin et al., AWQ, arXiv 2306.00978, section 3.2, without activations).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 128  # inputs that share an int4 scale
_LARGEST = {"int8": 127, "int4": 7}
_CLIPS = {"int8": (1.0,), "int4": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}


@dataclass(frozen=True)
class Quantized:
    """A matrix [out, in]: int8 `values` [out, in], of which int4 uses -7 to 7, and `scales` [out, blocks]."""

    kind: str
    values: torch.Tensor
    scales: torch.Tensor

    def restored(self) -> torch.Tensor:
        """Return the matrix that the integers stand for [out, in]."""
        blocks = self.values.float().view(self.values.shape[0], self.scales.shape[1], -1)
        return (blocks * self.scales.float()[:, :, None]).flatten(1)


def quantize(weight: torch.Tensor, kind: str, scale_type: torch.dtype) -> Quantized:
    """Return a float matrix [out, in] as "int8" or "int4".

    A matrix whose inputs do not divide into blocks of int4 is kept as int8 instead: see `kind_for`.
    """
    kind = kind_for(weight.shape[1], kind)
    count = weight.shape[1] // BLOCK if kind == "int4" else 1
    blocks = weight.detach().float().view(weight.shape[0], count, -1)
    peak = blocks.abs().amax(dim=2).clamp(min=1e-7)
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for clip in _CLIPS[kind]:
        scales = (peak * clip / _LARGEST[kind]).to(scale_type)
        values = (blocks / scales.float()[:, :, None]).round().clamp(-_LARGEST[kind], _LARGEST[kind])
        error = (values * scales.float()[:, :, None] - blocks).square().sum(dim=2)
        if best is None:
            best = values, scales, error
        else:
            better = error < best[2]
            best = (
                torch.where(better[:, :, None], values, best[0]),
                torch.where(better, scales, best[1]),
                torch.where(better, error, best[2]),
            )
    assert best is not None
    return Quantized(kind, best[0].flatten(1).to(torch.int8), best[1])


def kind_for(inputs: int, kind: str) -> str:
    """Return "int8" in place of "int4" for matrices whose inputs are not a multiple of 128."""
    return "int8" if kind == "int4" and inputs % BLOCK else kind


def dynamically_rounded(states: torch.Tensor) -> torch.Tensor:
    """Return states as ONNX's DynamicQuantizeLinear rounds them: to 256 steps of their range, which has zero in it."""
    low, high = states.amin().clamp(max=0.0), states.amax().clamp(min=0.0)
    scale = (high - low) / 255
    zero = (-low / scale).round().clamp(0, 255)
    return ((states / scale).round() + zero).clamp(0, 255).sub(zero) * scale
