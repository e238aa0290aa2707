"""The sizes of a model that is not exported: what the graphs of its bundle would multiply by. No weight is needed."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edgeprune.bundle import SELECTOR, Operations
from edgeprune.bundle.graph_io import SIGNALS
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.device.onnx_file import read_graph
from edgeprune.device.workload import ModelSizes, Shapes
from edgeprune.export.tracing import trace_selector
from edgeprune.families.base import Family, encoder_work
from edgeprune.model import signals_for
from edgeprune.plan import KeepPlan
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
        encoder_work=encoder_works(loaded.family, plan),
        selector=_selector_nodes(loaded, plan, lowering) if plan.input is not None else 0,
    )


def encoder_works(family: Family, plan: KeepPlan) -> tuple[Operations, Operations]:
    """Return the operations of the vision encoder for one image, under a plan and without the plan's cuts inside it."""
    whole = encoder_work(family.vision(plan.geometry))
    return encoder_work(family.vision(plan.geometry, cuts=plan.vision_cuts)) if plan.vision_cuts else whole, whole


def _matrices(module: nn.Module) -> Shapes:
    # Families multiply by linear layers alone; convolutions of patches are such layers too.
    return tuple(tuple(layer.weight.shape) for layer in module.modules() if isinstance(layer, nn.Linear))


def _selector_nodes(loaded: LoadedModel, plan: KeepPlan, lowering: Lowering) -> int:
    names = signals_for(plan, loaded.family)
    tower: Any = loaded.family.vision(plan.geometry, signals=bool(names), cuts=plan.vision_cuts)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        shapes = [tuple(output.shape) for output in tower(torch.empty(tower.takes))[1:]]
    signals = dict(zip(names, shapes, strict=False))  # the indices that cuts kept follow
    projector = copy.deepcopy(tower.projector) if len(names) == len(SIGNALS) else None
    for weight in () if projector is None else projector.parameters():
        weight.data = torch.zeros(()).expand(weight.shape)  # an outline's weights are no numbers
    with TemporaryDirectory() as folder:
        path = Path(folder) / Path(SELECTOR).name
        trace_selector(loaded.family.decoder(), plan, signals, lowering, path, projector)
        return read_graph(path).nodes
