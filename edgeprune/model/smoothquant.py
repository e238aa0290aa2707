"""SmoothQuant: products of 8-bit inputs and 8-bit weights, after outliers of the inputs have moved into the weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023, arXiv
2211.10438. A few channels of what a matrix multiplies are far larger than the others, and a scale that holds them leaves few of
the 256 steps to the rest. So inputs are divided by a factor for each channel, and the columns of the weights are multiplied by it:

    X W^T = (X diag(s)^-1) (W diag(s))^T    (equation 3)
    s_j = max|X_j|^a / max|W_j|^(1 - a)     (equation 4)

The magnitudes of inputs are those of samples. Matrices that multiply the same input share factors: max|W_j| is that of all of them.
As in the authors' code, max|W_j| and factors are at least 1e-5. Then one scale holds the inputs (static and per tensor, the paper's
O3), and the weights have one scale for each output, where the paper's have one for each matrix.

The paper searches a for each model; here it is searched for each input, by the error that is expected of the products. Rounding to
steps of size d moves a number by an error of variance d^2 / 12. Where even the least of these errors is large, inputs stay floats.
The paper smooths what norms write, and nothing else; here every other input may be smoothed too, in a node of its own.

FP8 (E4M3) needs no smoothing: its steps grow with the numbers, so outliers take none from the others. The scale makes the largest
input 448, the largest number of the type (Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433). Nor does NVFP4,
whose blocks have scales of their own (`edgeprune.model.nvfp4`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from edgeprune.model import nvfp4

STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9)  # of which each input has one
_STEPS = {"int8": 127.0, "fp8": 448.0}  # the largest input, in scales
_LEAST = 1e-5
_LEAST_SCALE = 2.0**-24  # of float16, in which inputs are restored


def smoothing_factors(inputs: torch.Tensor, weights: torch.Tensor, strength: float) -> torch.Tensor:
    """Return the factors [in] for the largest magnitudes of inputs and of weights by channel [in]. `strength`: the a above."""
    return (inputs.pow(strength) / weights.clamp(min=_LEAST).pow(1 - strength)).clamp(min=_LEAST)


def input_scale(largest: float, kind: str = "int8") -> float:
    """Return the scale that makes inputs up to `largest` numbers of `kind`: of float16 for int8 and fp8, of float32 for nvfp4."""
    if kind == "nvfp4":
        return nvfp4.scale_of_all(largest)
    return float(torch.tensor(largest / _STEPS[kind], dtype=torch.float16).clamp(min=_LEAST_SCALE))


def round_to_fp8(numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers rounded to FP8 E4M3, as floats; beyond 448 they are clipped, as engines do."""
    return numbers.clamp(-_STEPS["fp8"], _STEPS["fp8"]).to(torch.float8_e4m3fn).float()


@dataclass(frozen=True)
class InputRange:
    """What was seen of an input: by channel, the `largest` magnitude and the sum of `squares` [in], and the number of `rows`."""

    largest: torch.Tensor
    squares: torch.Tensor
    rows: int

    @classmethod
    def of(cls, states: torch.Tensor) -> InputRange:
        """Return the range of states [..., in]."""
        rows = states.flatten(0, -2)
        largest = rows.abs().amax(dim=0) if len(rows) else rows.new_zeros(rows.shape[1])
        return cls(largest, rows.square().sum(dim=0), len(rows))

    def __or__(self, other: InputRange) -> InputRange:
        return InputRange(torch.maximum(self.largest, other.largest), self.squares + other.squares, self.rows + other.rows)


@dataclass(frozen=True)
class Rounding:
    """How a matrix and what it multiplies become narrow: the smoothing `factors` [in] and the `scale` of the divided inputs.

    `kind`: of the inputs, "int8", "fp8", or "nvfp4", whose factors are 1 and whose scale is that of all blocks.
    """

    factors: torch.Tensor
    scale: float
    kind: str = "int8"

    @property
    def smooths(self) -> bool:
        """Whether any factor is other than 1."""
        return bool((self.factors != 1).any())

    def inputs(self, states: torch.Tensor) -> torch.Tensor:
        """Return states [..., in] divided by the factors and rounded, as floats."""
        if self.kind == "nvfp4":
            return nvfp4.rounded(states, self.scale)
        if self.kind == "fp8":
            return round_to_fp8(states / self.factors / self.scale) * self.scale
        return (states / self.factors / self.scale).round().clamp(-128, 127) * self.scale

    def weights(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight [out, in], not yet rounded, for such inputs."""
        return weight * self.factors

    def error(self, weight: torch.Tensor, inputs: InputRange, products: float) -> float:
        """Return the relative error that is expected of the products of int8 inputs with an int8 weight [out, in].

        `products`: the sum of their squares.
        """
        scaled = self.weights(weight)
        by_inputs = self.scale**2 * inputs.rows * float(scaled.square().sum())
        steps = scaled.abs().amax(dim=1) / _STEPS["int8"]
        by_weights = float(steps.square().sum()) * float((inputs.squares / self.factors.square()).sum())
        return ((by_inputs + by_weights) / 12 / products) ** 0.5 if products else 0.0


def save_roundings(roundings: Mapping[str, Rounding], path: Path) -> None:
    """Write roundings by the names of their matrices to a safetensors file."""
    save_file({name: torch.cat([torch.tensor([each.scale]), each.factors]) for name, each in roundings.items()}, path)


def load_roundings(path: Path, kind: str = "int8") -> dict[str, Rounding]:
    """Return what `save_roundings` wrote, of inputs of a `kind`."""
    return {name: Rounding(numbers[1:], float(numbers[0]), kind) for name, numbers in load_file(path).items()}
