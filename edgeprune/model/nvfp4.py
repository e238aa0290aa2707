"""NVFP4: numbers of 4 bits (E2M1) in blocks of 16, with an FP8 scale for each block and one float32 scale for all of them.

E2M1 has 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. The scale of all blocks makes the largest number 6 * 448, so that the scale
of its block is 448, the largest of FP8 (E4M3); the scale of every other block makes the block's largest number about 6:

    all = max|X| / (6 * 448)
    scale_b = FP8(max|X_b| / (6 * all))
    q = E2M1(x / (scale_b * all))

This is the format of NVIDIA's ModelOpt (`NVFP4QTensor` of nvidia-modelopt 0.47). Weights are known, so all three are theirs. For
activations samples decide the first, and engines compute the others as they come. Scales of blocks are at least 2^-9, the smallest
FP8 number above 0: a block that needs less is a millionth of the largest, or zeros.
"""

from __future__ import annotations

import torch

BLOCK = 16
LARGEST = 6.0  # of E2M1
SCALES = (2.0**-9, 448.0)  # the least and the largest FP8 scale of a block
_LEAST = 2.0**-126  # the smallest normal float32


def scale_of_all(largest: float) -> float:
    """Return the scale of all blocks, a number of float32, for numbers up to `largest`; 1 if these are zeros."""
    scale = torch.tensor(largest, dtype=torch.float32) / (LARGEST * SCALES[1])
    return float(scale.clamp(min=_LEAST)) if largest else 1.0


def block_scales(blocks: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the FP8 scales [...] of blocks [..., 16]. `scale`: of all blocks."""
    peaks = blocks.abs().amax(dim=-1) / (torch.tensor(scale) * LARGEST)
    return peaks.clamp(*SCALES).to(torch.float8_e4m3fn)


def round_to_fp4(numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers rounded to E2M1, ties to the even mantissa; beyond 6 they are clipped."""
    sizes = numbers.abs()
    steps = torch.where(sizes < 2, 0.5, torch.where(sizes < 4, 1.0, 2.0))
    return ((numbers / steps).round() * steps).clamp(-LARGEST, LARGEST)


def in_blocks(numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers [..., n] as blocks [..., n / 16, 16]."""
    return numbers.reshape(*numbers.shape[:-1], -1, BLOCK)


def rounded(numbers: torch.Tensor, scale: float) -> torch.Tensor:
    """Return numbers [..., n] as NVFP4 holds them, in float32. `scale`: of all blocks; blocks beyond 6 * 448 of it are clipped."""
    blocks = in_blocks(numbers)
    scales = (block_scales(blocks, scale).float() * scale)[..., None]
    return (round_to_fp4(blocks / scales) * scales).flatten(-2)
