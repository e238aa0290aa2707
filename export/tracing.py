"""Trace the graphs of a bundle with `torch.onnx.export(dynamo=True)`.

No shape depends on data: lengths of segments and caches are dynamic dimensions; keep budgets are constants bounded by the length
of the visual segment. All layers share the length of their text caches. Layers whose visual caches hold the same number of tokens
share that length. Both lengths include a null row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from edgeprune.bundle import GraphRecord
from edgeprune.bundle.graph_io import (
    PLACE,
    SEGMENTS,
    TIER,
    WEIGHT,
    WEIGHTS,
    cache_slots,
    decoder_inputs,
    decoder_outputs,
    kept_names,
    place_heads,
)
from edgeprune.checkpoint.weights import stored_in
from edgeprune.export.passes.pipeline import drop_unused_inputs, graph_record, run_passes
from edgeprune.export.torch_exporter import quick_exporter
from edgeprune.families.base import DecoderParts, Family
from edgeprune.io.progress import SILENT, Progress
from edgeprune.model import PrunedDecoder, Segment, TextEmbedding, input_selector, signals_for
from edgeprune.plan import KeepPlan
from edgeprune.plan.tiers import cache_group
from edgeprune.registry import method_class
from edgeprune.targets import Lowering

MEGABYTE = 10**6
_HEAD_STEP = 8  # GroupQueryAttention takes only multiples of it as head_dim
MAX_LENGTH = 32768  # upper bound of every dynamic length, in tokens


def trace_vision(family: Family, plan: KeepPlan, lowering: Lowering, path: Path, progress: Progress = SILENT) -> GraphRecord:
    """Write the vision encoder of one geometry: pixel_values [patches, patch pixels] -> visual_embeds [1, V, width].

    If the plan's input cut needs them, further outputs are vision_attention [V], vision_keys [V, key dim] and, if the family
    projects each token alone, vision_features [V, width]. If the plan has cuts in the encoder, V is the number of tokens after
    them, and kept.0, kept.1 ... are the token indices that each cut keeps.
    """
    signals = signals_for(plan, family)
    outputs = ["visual_embeds", *signals, *kept_names(plan, "vision")]
    tower: Any = family.vision(plan.geometry, signals=bool(signals), cuts=plan.vision_cuts).eval()
    return _trace(_Graph(tower, (torch.zeros(*tower.takes),), None, ["pixel_values"], outputs, "vision"), lowering, path, progress)


def trace_selector(
    parts: DecoderParts,
    plan: KeepPlan,
    signals: Mapping[str, Sequence[int]],
    lowering: Lowering,
    path: Path,
    projector: nn.Module | None = None,
) -> GraphRecord:
    """Write the input cut: visual_embeds, prompt_embeds -> kept_embeds [1, K, width], kept.N [K], where N is the cut's index.

    If the cut weighs, visual_weights [K] is an output too: the logarithms of how many tokens each kept one stands for. If the
    encoder has cuts, visual_order [V], the image indices, is an input too. `signals`: the shapes of the vision encoder's
    outputs that the cut needs, by name. `projector`: the module from features to visual tokens, if features are among them.
    """
    tokens = plan.tokens_from_encoder
    prompt_length = torch.export.Dim("words", min=1, max=MAX_LENGTH)
    generator = torch.Generator().manual_seed(0)
    arguments = [torch.randn(1, n, (1 + parts.planes) * parts.hidden, generator=generator) for n in (tokens, 5)]
    names, shapes = ["visual_embeds", "prompt_embeds"], [None, {1: prompt_length}]
    if plan.vision_cuts:
        arguments.append(torch.arange(tokens))
        names, shapes = [*names, "visual_order"], [*shapes, None]
    arguments += [torch.rand(*shape, generator=generator) for shape in signals.values()]
    names, shapes = [*names, *signals], [*shapes, *[None] * len(signals)]
    selector = input_selector(plan, parts.hidden, projector).eval()
    outputs, part = ["kept_embeds", *kept_names(plan, "input")], "" if projector is None else "projector"
    outputs += [WEIGHTS] if plan.weighs else []
    return _trace(_Graph(selector, tuple(arguments), tuple(shapes), names, outputs, part), lowering, path)


def trace_predictor(plan: KeepPlan, lowering: Lowering, path: Path) -> GraphRecord:
    """Write the keep-ratio predictor of a decode cut: attention_split [layers, 4], step [1] -> share [1]."""
    assert plan.decode is not None
    predictor = method_class(plan.decode.method)(plan.decode, plan.geometry).rate_predictor()
    arguments = torch.full((plan.layers, 4), 0.25), torch.ones(1)
    return _trace(_Graph(predictor, arguments, None, ["attention_split", "step"], ["share"]), lowering, path)


def trace_embedding(parts: DecoderParts, lowering: Lowering, path: Path, progress: Progress = SILENT) -> GraphRecord:
    """Write the embedding table: ids [1, n] -> embeds [1, n, width]."""
    length = torch.export.Dim("length", min=1, max=MAX_LENGTH)
    ids = torch.zeros(1, 5, dtype=torch.int64)
    return _trace(_Graph(TextEmbedding(parts), (ids,), ({1: length},), ["ids"], ["embeds"], "embedding"), lowering, path, progress)


def trace_decoder(
    parts: DecoderParts,
    axes: int,
    plan: KeepPlan,
    lowering: Lowering,
    path: Path,
    lower_tiers: Sequence[KeepPlan] = (),
    progress: Progress = SILENT,
) -> GraphRecord:
    """Write the decoder under a plan and its `lower_tiers`; see `edgeprune.bundle.graph_io` for inputs and outputs."""
    if not lower_tiers and not plan.weighs and all(cut.site in ("vision", "input") for cut in plan.cuts):
        plan = replace(plan, cuts=())  # a decoder without cuts of its own is the same whatever enters it
    options = {"fused": lowering.target.fused, "blocked": lowering.target.blocked}
    decoder = PrunedDecoder(parts, plan, lower_tiers=lower_tiers, **options).eval()
    lengths = {name: torch.export.Dim(name, min=0, max=MAX_LENGTH) for name in SEGMENTS}
    examples = dict(zip(SEGMENTS, (3, plan.tokens_entering_decoder, 5), strict=True))
    embeds = [torch.zeros(1, examples[name], (1 + parts.planes) * parts.hidden) for name in SEGMENTS]
    positions = [torch.zeros(axes, examples[name], dtype=torch.int64) for name in SEGMENTS]
    shapes: list[Any] = [{1: lengths[name]} for name in SEGMENTS] * 2 + [{0: lengths["visual"]}]
    arguments: list[Any] = [*embeds, *positions, torch.arange(plan.tokens_entering_decoder)]
    past, past_shapes = _example_caches(parts, (plan, *lower_tiers), getattr(torch, lowering.products))
    groups = torch.zeros(past[0].shape[0] - 1 + 3 + 5, 3)
    arguments += [
        torch.zeros(plan.tokens_entering_decoder) if plan.weighs else None,
        torch.zeros(1 + len(lower_tiers), dtype=torch.int64) if lower_tiers else None,
        groups if plan.follows_attention else None,
        _real_rows(past, past_shapes) if has_rows(parts, lowering) else None,
        past,
    ]
    tier = {0: torch.export.Dim(TIER, min=1, max=1 + len(lower_tiers))} if lower_tiers else None
    shapes += [
        {0: lengths["visual"]} if plan.weighs else None,
        tier,
        {0: torch.export.Dim.AUTO} if plan.follows_attention else None,
        None,
        past_shapes,
    ]
    kinds, rows = (parts.local_layers, parts.layer_states), has_rows(parts, lowering)
    names = decoder_inputs(plan, *kinds, tiers=bool(lower_tiers), rows=rows), decoder_outputs(plan, *kinds)
    graph = _Graph(_FlatDecoder(decoder), tuple(arguments), tuple(shapes), *names, "layers")
    return _trace(graph, lowering, path, progress, buffers=decoder.blocked and has_buffers(parts, plan))


def has_buffers(parts: DecoderParts, plan: KeepPlan) -> bool:
    """Return whether decode steps of a decoder for CPUs can read one buffer for keys and one for values.

    They cannot beside states, nor where a predictor follows the attention of every step, which GroupQueryAttention does not return,
    nor where some keys count more than others.
    """
    fits = parts.head_dim % _HEAD_STEP == 0
    return fits and not parts.layer_states and not plan.has_rate_predictor and not plan.weighs


def has_rows(parts: DecoderParts, lowering: Lowering) -> bool:
    """Return whether a decoder is told how many rows of its caches are real, so that TensorRT's steps can bind longer ones.

    States are replaced at every step, and older ones stay valid: no step can write them in place.
    """
    return lowering.target.tensorrt is not None and not parts.layer_states


def _real_rows(past: Sequence[torch.Tensor], shapes: Sequence[Any]) -> torch.Tensor:
    # The lengths of text and of each kind of visual caches, by their dimensions.
    lengths = {shape[0].__name__: len(rows) for rows, shape in zip(past, shapes, strict=True)}
    return torch.tensor(list(lengths.values()))


class _FlatDecoder(nn.Module):
    # The decoder with a flat tensor signature, in the order of the graph's inputs and outputs.
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
        order: torch.Tensor,
        weights: torch.Tensor | None,
        tier: torch.Tensor | None,
        groups: torch.Tensor | None,
        rows: torch.Tensor | None,
        past: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        output = self.decoder(
            Segment(prefix, prefix_positions),
            Segment(visual, visual_positions),
            Segment(suffix, suffix_positions),
            self.decoder.caches(past, rows),
            order,
            weights=weights,
            tier=tier,
            text_groups=groups,
        )
        return (
            output.logits,
            *self.decoder.flat_rows(output.rows),
            *self.decoder.flat_states(output.rows),
            *output.kept,
            *(() if output.split is None else (output.split,)),
        )


def _example_caches(parts: DecoderParts, plans: Sequence[KeepPlan], kind: torch.dtype) -> tuple[list[torch.Tensor], list[Any]]:
    # All example lengths differ, so that the exporter does not identify independent dimensions.
    text = torch.export.Dim("past_text", min=1, max=MAX_LENGTH)
    stages: dict[Any, Any] = {}
    past: list[tuple[torch.Tensor, Any]] = []
    visual: list[tuple[torch.Tensor, Any]] = []
    for layer, part in cache_slots(plans[0], parts.local_layers, parts.layer_states):
        stage = cache_group(plans, layer)
        length = stages.setdefault(stage, torch.export.Dim(f"past_visual_{len(stages)}", min=1, max=MAX_LENGTH))
        row = torch.zeros(1, parts.kv_heads, parts.head_dim, dtype=kind)
        if part == PLACE:
            row = torch.zeros(1, place_heads(plans[0], layer, parts.kv_heads), dtype=torch.int64)
        elif part == WEIGHT:
            row = torch.zeros(1, 1)
        past.append((row.repeat(7, *[1] * (row.ndim - 1)), {0: text}))
        visual.append((row.repeat(11 + list(stages).index(stage), *[1] * (row.ndim - 1)), {0: length}))
    states = [(torch.zeros(state.shape), None) for state in parts.layer_states]
    caches = [*past, *visual, *states]
    return [example for example, _ in caches], [shape for _, shape in caches]


@dataclass(frozen=True)
class _Graph:
    # A module to trace, with example arguments, their dynamic shapes, input and output names, and the part of the model.
    module: nn.Module
    arguments: tuple[Any, ...]
    shapes: Any
    inputs: list[str]
    outputs: list[str]
    part: str = ""


def _trace(graph: _Graph, lowering: Lowering, path: Path, progress: Progress = SILENT, *, buffers: bool = False) -> GraphRecord:
    progress.say("tracing")
    model = traced(graph, lowering.opset_of(graph.part))
    progress.say("rewriting")
    model = run_passes(model, _dimensions(graph), lowering, graph.part, stored_in(graph.module), buffers=buffers)
    drop_unused_inputs(model.graph)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    written = progress.count("writing MB of weights", weights // MEGABYTE)
    ir.save(model, path, external_data=f"{path.name}.data", callback=lambda tensor, info: written(info.offset // MEGABYTE))
    return graph_record(model.graph)


def traced(graph: _Graph, opset: int) -> ir.Model:
    """Return the exporter's graph of a module, before any pass. It depends only on the module, its arguments and the opset."""
    with quick_exporter():
        program = torch.onnx.export(
            graph.module,
            graph.arguments,
            dynamo=True,
            dynamic_shapes=graph.shapes,
            input_names=graph.inputs,
            output_names=graph.outputs,
            opset_version=opset,
            verbose=False,
            optimize=False,  # part of `run_passes`
        )
    assert program is not None  # the dynamo exporter always returns the program
    return program.model


def _dimensions(graph: _Graph) -> dict[str, dict[int, str]]:
    # The names of the dynamic axes of every input. Axes with an automatic dimension hold all text tokens.
    flat: list[Any] = []
    for argument, shape in zip(graph.arguments, graph.shapes or (None,) * len(graph.arguments), strict=True):
        flat += shape if isinstance(argument, list) else [] if argument is None else [shape]
    named = zip(graph.inputs, flat, strict=True)
    return {name: {axis: getattr(dim, "__name__", "text") for axis, dim in (shape or {}).items()} for name, shape in named}
