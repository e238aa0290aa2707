"""The eager model with the weights and roundings of a lowering: what a bundle of that precision is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from edgeprune.families.base import DecoderParts
from edgeprune.model.quantization import quantize
from edgeprune.targets import Lowering

_TYPES = {"float16": torch.float16, "float32": torch.float32}


@contextmanager
def at_precision(parts: DecoderParts, vision: nn.Module, lowering: Lowering) -> Iterator[None]:
    """Let a decoder and a vision tower compute as their graphs under a lowering do; they are as before afterwards.

    Matrices are replaced by what their integers stand for; inputs and outputs of products are rounded. The cache that attention is
    given rounds the rest.
    """
    with ExitStack() as changes:
        for part, module in (("layers", parts.layers), ("head", parts.lm_head), ("vision", vision)):
            for matrix in module.modules():
                if isinstance(matrix, nn.Linear):
                    changes.enter_context(_lowered(matrix, lowering.weights_of(part), _TYPES[lowering.products]))
        changes.enter_context(_lowered(parts.embed_tokens, lowering.weights_of("embedding"), torch.float32))
        yield


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
