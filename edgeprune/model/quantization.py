"""Symmetric weight quantization with zero point 0, as TensorRT requires, and the eager model at the precision of a lowering.

int8 has one scale per output; int4 has one per output and block of 128 inputs (weight-only, the form that TensorRT and ONNX Runtime
multiply directly). fp8 is E4M3 with one scale per output, whose largest weight becomes 448. int4 uses its whole range, -8 to 7. Its
scales are clipped: outliers are rare, so of a few scales up to that of the largest weight, the one with the least squared error is
taken (the clipping search of Lin et al., AWQ, arXiv 2306.00978, section 3.2, without activations), and then the best scale for the
integers that it gives. nvfp4 has blocks of 16 inputs (`edgeprune.model.nvfp4`).

`at_precision` gives the eager model the weights and roundings of a lowering, as the reference for a bundle of that precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeprune.errors import VerificationError
from edgeprune.families.base import DecoderParts
from edgeprune.model import nvfp4
from edgeprune.model.smoothquant import Rounding, round_to_fp8
from edgeprune.targets import Lowering

BLOCK = 128  # inputs that share an int4 scale
BLOCKS = {"int4": BLOCK, "nvfp4": nvfp4.BLOCK}  # the others have one scale an output
_RANGES = {"int8": (-127, 127), "int4": (-8, 7)}
_STEPS = {
    "int8": (127.0,),
    "fp8": (448.0,),
    "int4": (7.0, 7.5, 8.0, 8.5, 9.0, 9.5),
}  # scales that are tried: the block's largest weight is so many
_LEAST = {torch.float16: 2.0**-24, torch.float32: 2.0**-126}  # TensorRT refuses a scale of 0: a row of zeros has this one

_TAKEN = "taken"  # weights that are already as the lowering holds them
QUANTIZED = ("int8", "fp8", "int4", "nvfp4")
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
NARROW = {"fp16": torch.float16, "bf16": torch.bfloat16}  # weights that are rounded, not quantized


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix: int8 or FP8 `values` [out, in] (-8 to 7 for int4) and `scales` [out, blocks].

    The values of nvfp4 are held as FP8, which has all numbers of E2M1, and so are its scales; `scale` is that of all blocks.
    """

    kind: str
    values: torch.Tensor
    scales: torch.Tensor
    scale: float = 1.0

    def restored(self) -> torch.Tensor:
        """Return the dequantized matrix [out, in]."""
        blocks = self.values.float().view(self.values.shape[0], self.scales.shape[1], -1)
        return (blocks * (self.scales.float() * self.scale)[:, :, None]).flatten(1)


def quantize(weight: torch.Tensor, kind: str, scale_type: torch.dtype, largest: float | None = None) -> Quantized:
    """Quantize a float matrix [out, in] to `kind`, "int8", "fp8", "int4" or "nvfp4".

    A matrix whose inputs do not divide into int4 blocks becomes int8 instead (`kind_for`). `largest`: the largest magnitude of the
    matrix, for nvfp4, if `weight` is only some of its rows.
    """
    kind = kind_for(weight.shape[1], kind)
    blocks = weight.detach().float().view(weight.shape[0], blocks_of(weight.shape[1], kind), -1)
    if kind == "nvfp4":
        scale = nvfp4.scale_of_all(float(blocks.abs().max()) if largest is None else largest)
        scales = nvfp4.block_scales(blocks, scale)
        values = nvfp4.round_to_fp4(blocks / (scales.float() * scale)[..., None])
        return Quantized(kind, values.flatten(1).to(stored_type(kind)), scales, scale)
    scales = scales_for(blocks, kind, scale_type)
    return Quantized(kind, rounded(blocks, scales, kind).flatten(1).to(stored_type(kind)), scales)


def scales_for(blocks: torch.Tensor, kind: str, scale_type: torch.dtype) -> torch.Tensor:
    """Return the scales [...] of blocks of weights [..., n] that round with the least squared error; none is 0."""
    peak = blocks.abs().amax(dim=-1)
    best, least = _cast(peak / _STEPS[kind][0], scale_type), torch.full_like(peak, float("inf"))
    if len(_STEPS[kind]) == 1:
        return best
    values = torch.zeros_like(blocks)
    for steps in _STEPS[kind]:
        tried = _cast(peak / steps, scale_type)
        integers = rounded(blocks, tried, kind)
        error = _error(blocks, integers, tried)
        better = error < least
        best, least = torch.where(better, tried, best), torch.where(better, error, least)
        values = torch.where(better[..., None], integers, values)
    # For given integers q, the error of scale * q is least at <weights, q> / <q, q>.
    fitted = _cast((blocks * values).sum(dim=-1) / values.square().sum(dim=-1).clamp(min=1), scale_type)
    return torch.where(_error(blocks, rounded(blocks, fitted, kind), fitted) < least, fitted, best)


def rounded(blocks: torch.Tensor, scales: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the integers (FP8 numbers for fp8), as floats, that weights [..., n] round to with scales [...]."""
    if kind == "fp8":
        return round_to_fp8(blocks / scales.float()[..., None])
    return (blocks / scales.float()[..., None]).round().clamp(*_RANGES[kind])


def _cast(scales: torch.Tensor, scale_type: torch.dtype) -> torch.Tensor:
    # Clamped after the cast, which makes 0 of what float16 does not hold.
    return scales.to(scale_type).clamp(min=_LEAST[scale_type])


def _error(blocks: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (integers * scales.float()[..., None] - blocks).square().sum(dim=-1)


def stored_type(kind: str) -> torch.dtype:
    """Return the type of `Quantized.values` of a kind."""
    return torch.float8_e4m3fn if kind in ("fp8", "nvfp4") else torch.int8


def blocks_of(inputs: int, kind: str) -> int:
    """Return how many scales an output with such many inputs has."""
    return inputs // BLOCKS.get(kind, inputs)


def kind_for(inputs: int, kind: str) -> str:
    """Return `kind`, but "int8" instead of "int4" if `inputs` is not a multiple of 128."""
    return "int8" if kind == "int4" and inputs % BLOCK else kind


def dynamically_rounded(states: torch.Tensor) -> torch.Tensor:
    """Return states rounded as by ONNX's DynamicQuantizeLinear: to 256 steps of their range, extended to include zero."""
    low, high = states.amin().clamp(max=0.0), states.amax().clamp(min=0.0)
    scale = (high - low) / 255
    zero = (-low / scale).round().clamp(0, 255)
    return ((states / scale).round() + zero).clamp(0, 255).sub(zero) * scale


@contextmanager
def at_precision(
    parts: DecoderParts, vision: nn.Module, lowering: Lowering, fitted: Mapping[str, Quantized] | None = None
) -> Iterator[None]:
    """Make a decoder and a vision tower compute at the precision of a lowering, and restore them on exit.

    Matrices are replaced by their dequantized values; inputs and outputs of products are rounded. Attention rounds to the type of
    the cache. `fitted`: matrices that were quantized otherwise than by `quantize`, by name, such as decoder.layers.0.mlp.down_proj.
    """
    modules = (("layers", parts.layers), ("head", parts.lm_head), ("vision", vision))
    names = {"layers": "decoder.layers", "head": "decoder.lm_head", "vision": "vision"}
    with ExitStack() as changes:
        normed = changes.enter_context(
            norm_outputs(module for _, each in (*modules, ("", parts.norm)) for module in each.modules())
        )
        views = _Views(vision, lowering)
        for part, module in modules:
            for inner, matrix in module.named_modules(prefix=names[part]):
                if isinstance(matrix, nn.Linear):
                    wide = inner in lowering.wide
                    products = torch.float32 if wide else TYPES[lowering.products]
                    rounding = lowering.roundings.get(inner)
                    own = _own_kind(matrix, lowering, part)
                    kind = own or kind_for(matrix.in_features, lowering.weights_of(part, rounded=rounding is not None))
                    kind = "fp32" if kind == "fp16" and wide else kind
                    found = (fitted or {}).get(inner)
                    if found is not None:
                        changes.enter_context(_with_weight(matrix, found.restored()))
                    if rounding is not None:
                        changes.enter_context(_with_weight(matrix, rounding.weights(matrix.weight.detach())))
                    taken = own is not None or found is not None
                    changes.enter_context(_lowered(matrix, _TAKEN if taken else kind, products, inner, rounding))
                    if kind == "int8" and lowering.rounds(kind):
                        changes.enter_context(_rounded(matrix, normed, views))
        changes.enter_context(_lowered(parts.embed_tokens, lowering.weights_of("embedding"), torch.float32))
        yield


def _own_kind(matrix: nn.Linear, lowering: Lowering, part: str) -> str | None:
    # Layers of a quantized checkpoint know what of a lowering holds their own integers (edgeprune/checkpoint/packed.py).
    own_kind = getattr(getattr(matrix.weight, "stored", None), "own_kind", None)
    return own_kind and own_kind(lowering, part)


@contextmanager
def norm_outputs(modules: Iterable[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Record the last few outputs of norms, to recognize products whose input is one of them."""
    outputs: list[torch.Tensor] = []

    def note(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        outputs.append(output)
        del outputs[:-4]

    hooks = [module.register_forward_hook(note) for module in modules if "Norm" in type(module).__name__]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


class _Views:
    # Which rows of an encoder have a range of their own: those of each view, where the graph takes views one after another.
    def __init__(self, vision: nn.Module, lowering: Lowering) -> None:
        encoders: list[Any] = [module for module in vision.modules() if isinstance(getattr(module, "views", None), int)]
        self._views: int = encoders[0].views if encoders else 1
        layers = [encoder.layers for encoder in encoders if hasattr(encoder, "layers")]
        self._inside = {module for each in layers for module in each.modules()}
        self._everywhere, self._lowering = set(vision.modules()), lowering
        self._patches = 0  # of a view, in the encoder's last product

    def parts(self, matrix: nn.Linear, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the parts of a product's rows that have a range each."""
        if matrix not in self._everywhere or rows.shape[0] % self._views:
            return [rows]
        patches = rows.shape[0] // self._views
        if matrix in self._inside:
            self._patches = patches
        return rows.chunk(self._views) if self._lowering.in_turn(max(patches, self._patches)) else [rows]


@contextmanager
def _rounded(matrix: nn.Linear, normed: list[torch.Tensor], views: _Views) -> Iterator[None]:
    # Rounds as the graphs of export/passes/precision.py and views.py do.
    def rounded(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        rows = inputs[0]
        size = torch.ones(1) if any(rows is output for output in normed) else rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-20)
        return torch.cat([dynamically_rounded(part) for part in views.parts(matrix, rows / size)]) * size

    hook = matrix.register_forward_pre_hook(rounded)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _with_weight(module: Any, weight: torch.Tensor) -> Iterator[None]:
    own, module.weight = module.weight, nn.Parameter(weight)
    try:
        yield
    finally:
        module.weight = own


def _narrowed(values: torch.Tensor, kind: torch.dtype, name: str) -> torch.Tensor:
    # float16's infinities would end as logits that are no numbers, without a word of where they come from.
    rounded = values.to(kind).float()
    if values.isfinite().all() and not rounded.isfinite().all():
        raise VerificationError(
            f"{name} multiplies numbers up to {float(values.abs().max()):,.0f}, and "
            f"{str(kind).removeprefix('torch.')} ends at {torch.finfo(kind).max:,.0f}.",
            hint="Export the bundle again: what export finds to be large stays in float32. Or export with --precision bf16.",
        )
    return rounded


@contextmanager
def _lowered(module: Any, kind: str, products: torch.dtype, name: str = "", rounding: Rounding | None = None) -> Iterator[None]:
    # The parameter is replaced, not overwritten: it may be tied to another module.
    weight, bias = module.weight, getattr(module, "bias", None)
    with torch.no_grad():
        if kind in QUANTIZED:
            module.weight = nn.Parameter(quantize(weight, kind, products).restored().to(products).float())
        elif kind in NARROW or (kind == _TAKEN and products is not torch.float32):
            module.weight = nn.Parameter(weight.to(NARROW.get(kind, products)).float())
    if products is not torch.float32 and bias is not None:
        module.bias = nn.Parameter(bias.detach().to(products).float())
    hooks = _rounding_hooks(module, products, name, rounding)
    try:
        yield
    finally:
        module.weight = weight
        if bias is not None:
            module.bias = bias
        for hook in hooks:
            hook.remove()


def _rounding_hooks(module: Any, products: torch.dtype, name: str, rounding: Rounding | None) -> list[Any]:
    # Hooks that round the inputs and outputs of a product.
    def narrowed(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(_narrowed(value, products, name) for value in inputs)

    half, hooks = products is not torch.float32, []
    if half and rounding is not None and rounding.kind == "nvfp4":  # what becomes FP4 is float16 before
        hooks.append(module.register_forward_pre_hook(narrowed))
    if rounding is not None:
        hooks.append(module.register_forward_pre_hook(lambda _, inputs: tuple(map(rounding.inputs, inputs))))
    if half:
        hooks.append(module.register_forward_pre_hook(narrowed))
        hooks.append(module.register_forward_hook(lambda _, inputs, output: _narrowed(output, products, name)))
    return hooks
