"""Trace the three graphs of a bundle with `torch.onnx.export(dynamo=True)`.

No shape depends on data: lengths of the segments and caches are dynamic dimensions, the kept counts are constants bounded by
the length of the visual segment. Layers between the same two cuts share one cache length.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn

from edgeprune.families.base import DecoderParts
from edgeprune.model import PrunedDecoder, Segment
from edgeprune.plan import Geometry, KeepPlan
from edgeprune.runtime.engine import SEGMENTS, cache_name, kept_name

OPSET = 20  # what TensorRT 10.3 of JetPack 6 reads
MAX_LENGTH = 32768  # upper bound of every dynamic length, in tokens


def trace_vision(tower: nn.Module, geometry: Geometry, patch_pixels: int, path: Path) -> None:
    """Write the vision encoder of one geometry: pixel_values [patches, patch_pixels] -> visual_embeds [1, V, hidden]."""
    patches = geometry.tokens * geometry.merge**2
    example = torch.zeros(patches, patch_pixels)
    _trace(tower, (example,), None, ["pixel_values"], ["visual_embeds"], path)


def trace_embedding(embed_tokens: nn.Module, path: Path) -> None:
    """Write the embedding table: ids [1, n] -> embeds [1, n, hidden]."""
    length = torch.export.Dim("length", min=1, max=MAX_LENGTH)
    _trace(embed_tokens, (torch.zeros(1, 5, dtype=torch.int64),), ({1: length},), ["ids"], ["embeds"], path)


def trace_decoder(parts: DecoderParts, axes: int, plan: KeepPlan, path: Path) -> None:
    """Write the decoder under a plan; names and shapes of its inputs and outputs are those of `edgeprune.runtime.engine`."""
    decoder = PrunedDecoder(parts, plan).eval()
    lengths = {name: torch.export.Dim(name, min=0, max=MAX_LENGTH) for name in SEGMENTS}
    examples = dict(zip(SEGMENTS, (3, plan.geometry.tokens, 5), strict=True))
    hidden = parts.hidden
    embeds = [torch.zeros(1, examples[name], hidden) for name in SEGMENTS]
    positions = [torch.zeros(axes, examples[name], dtype=torch.int64) for name in SEGMENTS]
    shapes = [{1: lengths[name]} for name in SEGMENTS]
    caches, cache_shapes = _example_caches(parts, plan)
    layers = [(layer, part) for layer in range(plan.layers) for part in ("key", "value")]
    inputs = [f"{name}_embeds" for name in SEGMENTS] + [f"{name}_positions" for name in SEGMENTS]
    inputs += [cache_name(*layer) for layer in layers]
    outputs = ["logits", *(cache_name(*layer, present=True) for layer in layers)]
    outputs += [kept_name(index) for index in range(len(plan.cuts))]
    arguments = (*embeds, *positions, caches)
    _trace(_FlatDecoder(decoder), arguments, (*shapes, *shapes, cache_shapes), inputs, outputs, path)


class _FlatDecoder(nn.Module):
    # The decoder with tensors only in its signature, in the order of the graph's inputs and outputs.
    def __init__(self, decoder: PrunedDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        prefix: torch.Tensor,
        visual: torch.Tensor,
        suffix: torch.Tensor,
        prefix_positions: torch.Tensor,
        visual_positions: torch.Tensor,
        suffix_positions: torch.Tensor,
        caches: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        output = self.decoder(
            Segment(prefix, prefix_positions),
            Segment(visual, visual_positions),
            Segment(suffix, suffix_positions),
            list(zip(caches[::2], caches[1::2], strict=True)),
        )
        return (output.logits, *(part for cache in output.caches for part in cache), *output.kept)


def _example_caches(parts: DecoderParts, plan: KeepPlan) -> tuple[list[torch.Tensor], list[dict[int, Any]]]:
    # One dynamic length for all layers of a stage; the example lengths differ, so that none is taken for another.
    dims: dict[int, Any] = {}
    caches: list[torch.Tensor] = []
    shapes: list[dict[int, Any]] = []
    for layer in range(plan.layers):
        stage = dims.setdefault(plan.alive(layer), torch.export.Dim(f"past_{len(dims)}", min=0, max=MAX_LENGTH))
        length = 7 + list(dims).index(plan.alive(layer))
        for _ in range(2):
            caches.append(torch.zeros(1, parts.kv_heads, length, parts.head_dim))
            shapes.append({2: stage})
    return caches, shapes


def _trace(module: nn.Module, arguments: tuple[Any, ...], shapes: Any, inputs: list[str], outputs: list[str], path: Path) -> None:
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None  # the dynamo exporter always returns the program
    # The exporter notes the source line of every node, with paths of the machine that exports.
    ClearMetadataAndDocStringPass()(program.model)
    program.save(path, external_data=True)


@contextmanager
def _quiet() -> Iterator[None]:
    # The exporter notes on every run that torchvision is absent and that renamed inputs share dimensions.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
