"""The sizes of a model that is not exported: what the graphs of its bundle would multiply by. No weight is needed."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from edgeprune.bundle import SELECTOR
from edgeprune.bundle.graph_io import SIGNALS
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.device.onnx_file import read_graph
from edgeprune.device.workload import ModelSizes, Shapes
from edgeprune.export.tracing import trace_selector
from edgeprune.families.base import DecoderParts
from edgeprune.plan import KeepPlan
from edgeprune.registry import method_class
from edgeprune.targets import Lowering


def sizes_of(loaded: LoadedModel, plan: KeepPlan, lowering: Lowering) -> ModelSizes:
    """Return the sizes of a model or an outline under a plan; of the graphs that an export traces, only the input cut's is.

    Raises PlanError if the plan was made for another model.
    """
    loaded.check_plan(plan)
    tower: Any = loaded.family.vision(plan.geometry, cuts=plan.vision_cuts)
    parts = loaded.family.decoder()
    return ModelSizes(
        decoder=loaded.decoder_shape(),
        vision_weights=_matrices(tower),
        decoder_weights=_matrices(parts.layers),
        blocks=tower.blocks,
        patches=tower.takes[0],
        selector=_selector_nodes(parts, plan, lowering) if plan.input is not None else 0,
    )


def _matrices(module: nn.Module) -> Shapes:
    # Families multiply by linear layers alone; convolutions of patches are such layers too.
    return tuple(tuple(layer.weight.shape) for layer in module.modules() if isinstance(layer, nn.Linear))


def _selector_nodes(parts: DecoderParts, plan: KeepPlan, lowering: Lowering) -> int:
    with TemporaryDirectory() as folder:
        path = Path(folder) / Path(SELECTOR).name
        needed = method_class(plan.input.method).needs if plan.input is not None else ()
        shapes = ((plan.tokens_from_encoder,), (plan.tokens_from_encoder, parts.hidden))  # keys of any width make the same nodes
        signals = dict(zip(SIGNALS, shapes, strict=False)) if needed else {}
        trace_selector(parts, plan, signals, lowering, path)
        return read_graph(path).nodes
