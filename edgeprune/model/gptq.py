"""GPTQ: int4 weights found column by column, where the columns that follow make up for the error of each.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023, arXiv 2210.17323,
Algorithm 1. A matrix W [out, in] multiplies rows X [tokens, in]. Columns are rounded in order, and an error e in column i moves the
later columns j by -e * U[i, j] / U[i, i], which keeps the products closest. U is the upper Cholesky factor of the inverse of X^T X,
whose diagonal has 1 % of its mean added first (section 3.3).

The blocks that share a scale are also those after which the rest of the matrix is updated at once. As the authors' code does for
groups, a scale is chosen when its block is reached, from the weights as they are by then; it is the one that `scales_for` chooses
instead of that of the largest weight. The columns keep their order (no act-order): a block is 128 neighbours, and neither TensorRT
nor ONNX Runtime multiplies others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edgeprune.model.quantization import BLOCK, Quantized, rounded, scales_for

DAMPING = 0.01
_VALUES, _SCALES = "values", "scales"


def gptq(weight: torch.Tensor, hessian: torch.Tensor, scale_type: torch.dtype) -> Quantized:
    """Quantize a float matrix [out, in] to int4, given X^T X [in, in] of the rows X that it multiplies.

    The inputs are a multiple of 128.
    """
    factor, rest = _inverse_factor(hessian), weight.detach().float().clone()
    values, scales = torch.empty(rest.shape, dtype=torch.int8, device=rest.device), list[torch.Tensor]()
    for start in range(0, rest.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        scale = scales_for(rest[:, block], "int4", scale_type)
        errors = torch.empty_like(rest[:, block])
        for index, column in enumerate(range(start, start + BLOCK)):
            integers = rounded(rest[:, column, None], scale, "int4")[:, 0]
            error = (rest[:, column] - integers * scale.float()) / factor[column, column]
            rest[:, column : block.stop] -= error[:, None] * factor[column, column : block.stop]
            values[:, column], errors[:, index] = integers.to(torch.int8), error
        rest[:, block.stop :] -= errors @ factor[block, block.stop :]
        scales.append(scale)
    return Quantized("int4", values, torch.stack(scales, dim=1))


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    # Of the damped inverse. The largest eigenvalue is at most the trace, so damping bounds the condition by 100 times the number
    # of inputs, which float32 inverts. Inputs that were never met are rounded without regard to others.
    damped, mean = hessian.clone(), hessian.diagonal().mean()
    damped.diagonal().add_(mean * DAMPING if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


@dataclass(frozen=True)
class FittedMatrix:
    """An int4 matrix in a safetensors file: its integers, two to a byte, and its scales."""

    path: Path
    shape: tuple[int, int]

    @classmethod
    def save(cls, quantized: Quantized, path: Path) -> FittedMatrix:
        """Write a matrix and return it as it is in the file."""
        low, high = quantized.values[:, ::2], quantized.values[:, 1::2]
        save_file({_VALUES: (low & 15) | (high << 4), _SCALES: quantized.scales}, path)
        return cls(path, (quantized.values.shape[0], quantized.values.shape[1]))

    def quantized(self, start: int, stop: int) -> Quantized:
        """Return the rows from `start` to `stop`."""
        with safe_open(self.path, framework="pt") as file:
            packed: torch.Tensor = file.get_slice(_VALUES)[start:stop]
            scales: torch.Tensor = file.get_slice(_SCALES)[start:stop]
        # A shift to the right keeps the sign, which a shift to the left has moved there.
        return Quantized("int4", torch.stack([packed << 4 >> 4, packed >> 4], dim=2).flatten(1), scales)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the dequantized rows from `start` to `stop` in float32 [stop - start, in]."""
        return self.quantized(start, stop).restored()
