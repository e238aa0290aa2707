"""The eager model with the weights and roundings of a lowering: what a bundle of that precision is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from edgeprune.families.base import DecoderParts
from edgeprune.model.quantization import dynamically_rounded, kind_for, quantize
from edgeprune.targets import Lowering

_TYPES = {"float16": torch.float16, "float32": torch.float32}


@contextmanager
def at_precision(parts: DecoderParts, vision: nn.Module, lowering: Lowering) -> Iterator[None]:
    """Let a decoder and a vision tower compute as their graphs under a lowering do; they are as before afterwards.

    Matrices are replaced by what their integers stand for; inputs and outputs of products are rounded. The cache that attention is
    given rounds the rest.
    """
    modules = (("layers", parts.layers), ("head", parts.lm_head), ("vision", vision))
    with ExitStack() as changes:
        normed = changes.enter_context(_normed(module for _, each in (*modules, ("", parts.norm)) for module in each.modules()))
        for part, module in modules:
            for matrix in module.modules():
                if isinstance(matrix, nn.Linear):
                    kind = kind_for(matrix.in_features, lowering.weights_of(part))
                    changes.enter_context(_lowered(matrix, kind, _TYPES[lowering.products]))
                    if kind == "int8" and lowering.rounds(kind):
                        changes.enter_context(_rounded(matrix, normed))
        changes.enter_context(_lowered(parts.embed_tokens, lowering.weights_of("embedding"), torch.float32))
        yield


@contextmanager
def _normed(modules: Iterable[nn.Module]) -> Iterator[list[torch.Tensor]]:
    # The last few outputs of norms: whether a product's input is one of them.
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


@contextmanager
def _rounded(matrix: nn.Linear, normed: list[torch.Tensor]) -> Iterator[None]:
    # As export/integers.py writes it.
    def rounded(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        rows = inputs[0]
        size = torch.ones(1) if any(rows is output for output in normed) else rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-20)
        return dynamically_rounded(rows / size) * size

    hook = matrix.register_forward_pre_hook(rounded)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _lowered(module: Any, kind: str, products: torch.dtype) -> Iterator[None]:
    # Only what is tied to nothing else may change: the parameter is replaced, not written to.
    weight, bias = module.weight, getattr(module, "bias", None)
    with torch.no_grad():
        if kind in ("int8", "int4"):
            module.weight = nn.Parameter(quantize(weight, kind, products).restored().to(products).float())
        elif kind == "fp16":
            module.weight = nn.Parameter(weight.half().float())
    hooks = []
    if products is torch.float16:
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().half().float())
        hooks.append(module.register_forward_pre_hook(lambda _, inputs: tuple(value.half().float() for value in inputs)))
        hooks.append(module.register_forward_hook(lambda _, inputs, output: output.half().float()))
    try:
        yield
    finally:
        module.weight = weight
        if bias is not None:
            module.bias = bias
        for hook in hooks:
            hook.remove()
