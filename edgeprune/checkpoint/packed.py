"""Linear layers that a GPTQ or AWQ checkpoint holds as packed integers: rows in float32, or the integers themselves.

A weight is scale * (integer - zero point), with one scale and zero point per output and group of inputs. Words of 32 bits hold 8
integers of 4 bits or 4 of 8 bits, the first in the lowest bits. Matrices are stored as [in, out], scales as [groups, out].

GPTQ (Frantar et al., arXiv 2210.17323; the layout of AutoGPTQ and GPTQModel) packs weights along the inputs and zero points along
the outputs, the latter less one except in its second format. `g_idx` is the group of each input, which is out of order if inputs
were quantized by the size of their activations (desc_act). AWQ (Lin et al., arXiv 2306.00978; AutoAWQ's "gemm") packs both along
the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from edgeprune.checkpoint import weights
from edgeprune.checkpoint.formats import Packing
from edgeprune.checkpoint.weights import CheckpointTensor, StoredTensor
from edgeprune.errors import UnsupportedModelError
from edgeprune.targets import Lowering

_BLOCKS = (128, 64, 32, 16)  # inputs that share an int4 scale in a graph: what both TensorRT and ONNX Runtime multiply directly
_BITS = {"gptq": (4, 8), "awq": (4,)}
_PLACES = {"gptq": (0, 1, 2, 3, 4, 5, 6, 7), "awq": (0, 4, 1, 5, 2, 6, 3, 7)}  # where 8 outputs are in a word of 4-bit integers
_PIECE = 1 << 22  # weights unpacked at once
_WEIGHT, _ZEROS, _SCALES, _GROUPS = "qweight", "qzeros", "scales", "g_idx"


@dataclass(frozen=True)
class PackedMatrix:
    """The weight [out, in] of a linear layer, in words. `parts`: its tensors by the last part of their names."""

    name: str
    parts: Mapping[str, StoredTensor]
    packing: Packing
    bits: int
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.size

    @property
    def large(self) -> bool:
        """Whether the matrix has LARGE elements or more."""
        return weights.is_large(self.size)

    @property
    def groups(self) -> int:
        """The number of groups of inputs."""
        return self.parts[_SCALES].size[0]

    @cached_property
    def group(self) -> int:
        """The number of inputs in every group; 0 if groups differ in size."""
        whole, rest = divmod(self.size[1], self.groups)
        even = not rest and bool((torch.bincount(self._group_of(), minlength=self.groups) == whole).all())
        return whole if even else 0

    @cached_property
    def order(self) -> torch.Tensor | None:
        """The inputs sorted by group [in], or None if they are already."""
        group_of = self._group_of()
        return None if bool((group_of.diff() >= 0).all()) else torch.sort(group_of, stable=True).indices

    @cached_property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle, as TensorRT requires."""
        return not self.zero_points().any()

    @property
    def block(self) -> int:
        """The number of inputs of an int4 block that hold these groups exactly, 0 if there is none.

        A group of more than 128 inputs becomes several blocks with equal scales.
        """
        return next((block for block in _BLOCKS if self.bits == 4 and self.group and self.group % block == 0), 0)

    def own_kind(self, lowering: Lowering, part: str) -> str | None:
        """Return "int4" or "int8" if a lowering of `part` holds the checkpoint's own integers and scales, else None.

        int4 is for the decoder's graph, whose opset has it. int8 has one scale per output and no zero points.
        """
        if self.bits == 4:
            return "int4" if lowering.precision == "int4" and part in ("layers", "head") and self.block else None
        return "int8" if lowering.weights_of(part) == "int8" and self.groups == 1 and self.symmetric else None

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the exact dequantized rows from `start` to `stop` in float32 [stop - start, in]."""
        scales, zeros = self.scales(start, stop).float(), self.zero_points(start, stop)
        values, group_of = self._middled(start, stop), self._group_of()
        return ((values - zeros[group_of]).float() * scales[group_of]).T

    def read(self) -> torch.Tensor:
        """Return the dequantized matrix in float32."""
        outputs, inputs = self.size
        whole, step = torch.empty(self.size), max(_PIECE // inputs, 1)
        for start in range(0, outputs, step):
            whole[start : start + step] = self.rows(start, min(start + step, outputs))
        return whole

    def integers(self, start: int, stop: int) -> torch.Tensor:
        """Return the integers less the middle as int8 [stop - start, in]: -8 to 7 for 4 bits. Inputs are sorted by group."""
        values = self._middled(start, stop).to(torch.int8)
        return (values if self.order is None else values[self.order]).T

    def zero_points(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return the zero points of outputs, less the middle, as integers [groups, outputs]."""
        return self._unpacked_outputs(_ZEROS, start, stop) - self._middle

    def scales(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return the scales of outputs in their stored type [groups, outputs]."""
        return self.parts[_SCALES].columns(start, self.size[0] if stop is None else stop)

    @property
    def _middle(self) -> int:
        return 1 << (self.bits - 1)

    def _group_of(self) -> torch.Tensor:
        # The group of each input [in]. The last group may be smaller.
        if _GROUPS in self.parts:
            return self.parts[_GROUPS].read().long()
        return torch.arange(self.size[1]) // -(-self.size[1] // self.groups)

    def _middled(self, start: int, stop: int) -> torch.Tensor:
        # The integers less the middle [in, stop - start], in the order of the inputs.
        if self.packing.method == "awq":
            return self._unpacked_outputs(_WEIGHT, start, stop) - self._middle
        words = self.parts[_WEIGHT].columns(start, stop)
        return self._unpack(words[:, None], torch.arange(0, 32, self.bits)[:, None]).flatten(0, 1) - self._middle

    def _unpacked_outputs(self, part: str, start: int, stop: int | None) -> torch.Tensor:
        # The integers of outputs of a tensor that is packed along them.
        stop, count = self.size[0] if stop is None else stop, 32 // self.bits
        first = start // count
        words = self.parts[part].columns(first, -(-stop // count))
        if self.packing.layout == "gptq":
            # The first format takes one from every zero point. GPTQModel takes it from the word, so that a 0 borrows from the next.
            words = words.long() + sum(1 << shift for shift in range(0, 32, self.bits))
        places = torch.tensor(_PLACES[self.packing.method][:count])
        return self._unpack(words[:, :, None], self.bits * places).flatten(1)[:, start - first * count : stop - first * count]

    def _unpack(self, words: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
        return (words >> shifts.int()) & ((1 << self.bits) - 1)


def with_packed_layers(name: str, stored: list[StoredTensor], packing: Packing | None) -> list[CheckpointTensor]:
    """Return the tensors of a checkpoint, with the parts of each quantized layer joined to its weight.

    Raises UnsupportedModelError for incomplete layers, layers of other bits, and for packed layers without `packing`.
    """
    layers: dict[str, dict[str, StoredTensor]] = {}
    for tensor in stored:
        layer, _, part = tensor.name.rpartition(".")
        if part in (_WEIGHT, _ZEROS, _SCALES, _GROUPS):
            layers.setdefault(layer, {})[part] = tensor
    packed = {layer: parts for layer, parts in layers.items() if _WEIGHT in parts}
    if packed and packing is None:
        raise UnsupportedModelError(
            f"{name} has quantized layers such as {next(iter(packed))}, but no quantization_config in its config.json.",
            hint="Copy the config.json of the same checkpoint.",
        )
    joined = {tensor.name for parts in packed.values() for tensor in parts.values()}
    plain: list[CheckpointTensor] = [tensor for tensor in stored if tensor.name not in joined]
    return plain if packing is None else [*plain, *(_matrix(layer, parts, packing) for layer, parts in packed.items())]


def spare_biases(model: nn.Module, sources: list[CheckpointTensor]) -> Iterator[str]:
    """Yield the model's names of biases that quantized layers have in the checkpoint alone, and that are zero throughout.

    AutoGPTQ writes a bias for every layer, as in the published GPTQ checkpoints of Qwen2-VL (QwenLM/Qwen3-VL#416).
    """
    stored = {source.name: source for source in sources}
    for name, module in model.named_modules():
        source = getattr(getattr(module, "weight", None), "stored", None)
        if isinstance(source, PackedMatrix) and getattr(module, "bias", None) is None:
            bias = stored.get(f"{source.name.removesuffix('weight')}bias")
            if bias is not None and not bias.read().any():
                yield f"{name}.bias"


def _matrix(layer: str, parts: Mapping[str, StoredTensor], packing: Packing) -> PackedMatrix:
    sizes = {part: tensor.size for part, tensor in parts.items()}
    if not {_WEIGHT, _ZEROS, _SCALES} <= set(sizes) or any(len(sizes[part]) != 2 for part in (_WEIGHT, _ZEROS, _SCALES)):
        raise UnsupportedModelError(f"The quantized layer {layer} is incomplete: it has {sizes}.", hint="Download it again.")
    rows, (groups, outputs) = sizes[_WEIGHT][0], sizes[_SCALES]
    bits = 32 * sizes[_ZEROS][1] // max(outputs, 1)
    if bits not in _BITS[packing.method]:
        raise UnsupportedModelError(
            f"The quantized layer {layer} has {bits} bits, which are not read.",
            hint=f"{packing.method} is read with {' or '.join(map(str, _BITS[packing.method]))} bits.",
        )
    inputs = rows if packing.method == "awq" else rows * 32 // bits
    words = (inputs, outputs * bits // 32) if packing.method == "awq" else (inputs * bits // 32, outputs)
    expected = {_WEIGHT: words, _ZEROS: (groups, outputs * bits // 32), _SCALES: (groups, outputs), _GROUPS: (inputs,)}
    kinds = {part: tensor.kind for part, tensor in parts.items()}
    if any(kind != "I32" for part, kind in kinds.items() if part != _SCALES) or not kinds[_SCALES].endswith(("F16", "F32")):
        raise UnsupportedModelError(f"The parts of the quantized layer {layer} have types that are not read: {kinds}.")
    if sizes != {part: expected[part] for part in sizes} or not 0 < groups <= inputs:
        raise UnsupportedModelError(f"The parts of the quantized layer {layer} do not fit: they have the sizes {sizes}.")
    if _GROUPS in parts and not 0 <= (named := parts[_GROUPS].read()).min() <= named.max() < groups:
        raise UnsupportedModelError(f"{layer}.{_GROUPS} names groups that the quantized layer does not have.")
    return PackedMatrix(f"{layer}.weight", parts, packing, bits, (outputs, inputs))
