"""The pass pipeline over a traced graph: stored weights, optimization, dimension names, fusions, precision."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.fusion._rms_normalization import rms_normalization_rules

from edgeprune.bundle import GraphRecord, Tensor
from edgeprune.checkpoint.weights import Matrix, address
from edgeprune.errors import UnsupportedModelError
from edgeprune.export.passes.attention import expand_blocked
from edgeprune.export.passes.encoder_attention import fuse_encoder_attention
from edgeprune.export.passes.fusion import divide_norms, fuse_qkv, fuse_rotation, fuse_sums, merge_reshapes, optimize
from edgeprune.export.passes.precision import lower_products, lower_table
from edgeprune.export.passes.recurrence import expand_delta_rules
from edgeprune.export.passes.sequences import rows_as_sequences
from edgeprune.export.passes.smoothing import smooth_products
from edgeprune.export.passes.views import encode_views_in_turn
from edgeprune.export.passes.weights import LazyInitializer
from edgeprune.targets import Lowering


def run_passes(
    model: ir.Model,
    dimensions: Mapping[str, Mapping[int, str]],
    lowering: Lowering,
    part: str,
    stored: Mapping[int, Matrix],
    *,
    buffers: bool = False,
) -> ir.Model:
    """Apply all passes of a lowering to a traced graph and return the result.

    `dimensions`: names of the dynamic axes of inputs. `part`: the part of the model, "layers" (the decoder), "vision",
    "projector" (a selection with the projector in it), "embedding", or "" for a graph whose precision does not change. `stored`:
    the sources of weights that are read when the graph is saved, by address. `buffers`: as for `expand_blocked`.
    """
    _use_stored_weights(model.graph, stored)
    optimize(model)
    expand_delta_rules(model.graph, single=lowering.target.blocked)
    # The exporter records the source line of every node, including paths of the exporting machine.
    ClearMetadataAndDocStringPass()(model)
    _name_dimensions(model.graph, dimensions)
    if lowering.target.fused:
        model = rewrite(model, pattern_rewrite_rules=rms_normalization_rules)
    elif lowering.target.tensorrt is None:
        divide_norms(model.graph)
    if lowering.target.blocked:
        fuse_qkv(model.graph)
        fuse_rotation(model.graph)
        fuse_encoder_attention(model.graph)
        merge_reshapes(model.graph)
        expand_blocked(model.graph, buffers=buffers, kv=lowering.kv)
        if part == "layers":
            fuse_sums(model.graph)
        if buffers and lowering.precision != "fp32":
            rows_as_sequences(model.graph)
    _lower(model, lowering, part)
    return model


def _lower(model: ir.Model, lowering: Lowering, part: str) -> None:
    # To the precision, and what can be done only then.
    if part == "embedding":
        lower_table(model.graph, lowering)
    elif part in ("layers", "vision", "projector"):
        smooth_products(model.graph, lowering, part)
        lower_products(model.graph, lowering, part)
    RemoveUnusedNodesPass()(model)
    if part == "vision":
        encode_views_in_turn(model, lowering)


def drop_unused_inputs(graph: ir.Graph) -> None:
    """Remove the inputs that no node reads, so that the runtime need not compute them.

    The result of a selector without the prompt as input does not depend on the prompt, so the runtime can cache it.
    """
    for value in [value for value in graph.inputs if not value.uses() and value not in graph.outputs]:
        graph.inputs.remove(value)


def graph_record(graph: ir.Graph) -> GraphRecord:
    """Return the names, types and shapes of a graph's inputs and outputs."""
    return GraphRecord(*({str(value.name): _tensor(value) for value in side} for side in (graph.inputs, graph.outputs)))


def _tensor(value: ir.Value) -> Tensor:
    assert value.shape is not None and value.dtype is not None
    return Tensor(str(value.dtype.numpy()), tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape))


def _use_stored_weights(graph: ir.Graph, stored: Mapping[int, Matrix]) -> None:
    for value in graph.initializers.values():
        tensor = value.const_value.raw if value.const_value is not None else None
        if not isinstance(tensor, torch.Tensor):
            continue
        source = stored.get(address(tensor))
        if source is not None:
            assert tuple(tensor.shape) == source.shape
            value.const_value = LazyInitializer(source, str(value.name))
        elif tensor.is_floating_point() and tensor.isnan().any():
            # Placeholders are NaN, so a family that computes with a large matrix ends here too.
            raise UnsupportedModelError(f"Some of the numbers that {value.name} becomes are none: the weights are broken.")


def _name_dimensions(graph: ir.Graph, dimensions: Mapping[str, Mapping[int, str]]) -> None:
    # The exporter names shared dimensions s31 and the like; an engine's optimization profile needs meaningful names.
    renamed: dict[str, str] = {}
    for value in graph.inputs:
        for axis, name in dimensions.get(value.name or "", {}).items():
            assert value.shape is not None
            renamed[str(value.shape[axis].value)] = name  # type: ignore[union-attr]
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, renamed)) + r")\b")
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            [
                pattern.sub(lambda match: renamed[match[0]], axis.value)
                if renamed and isinstance(axis, ir.SymbolicDim) and axis.value is not None  # a length that is not known has no name
                else axis
                for axis in value.shape
            ]
        )
