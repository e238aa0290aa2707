"""Measure how large the products of each matrix become in one answer, for lowerings that multiply in float16.

The model may be one whose large matrices are still in their files: each is read in slices when it is multiplied, so one slice is in
memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edgeprune.calibration.replay.reference import TorchBackend, reference_model
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.checkpoint.weights import Matrix
from edgeprune.plan import KeepPlan
from edgeprune.runtime.generation.conversation import Conversation, ImageOrFrames
from edgeprune.runtime.generation.sampling import Sampling
from edgeprune.tabletop.dataset import frames_for
from edgeprune.tabletop.questions import DESCRIBE_PROMPT

# A product beyond this may exceed float16 (65,504) with another image or question.
FLOAT16_MARGIN = 30_000.0
_SLICE = 1 << 24  # elements of a matrix that are read at a time: 64 MB


def largest_products(loaded: LoadedModel, plan: KeepPlan) -> dict[str, float]:
    """Return the largest magnitude among inputs and products of each matrix, in one prefill of a drawn scene without pruning.

    Keys are the names of `TorchBackend.matrices`.
    """
    model = reference_model(loaded, replace(plan, cuts=()))
    backend, largest = model.backend, dict[str, float]()
    assert isinstance(backend, TorchBackend)
    frames = frames_for(plan.geometry)
    image: ImageOrFrames = frames if loaded.family.image_text(plan.geometry).kind == "video" else frames[0]

    def noting(name: str) -> Any:
        def note(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            reached = max(float(value.abs().max().nan_to_num()) for value in (*inputs, output) if value.numel())
            largest[name] = max(largest.get(name, 0.0), reached)

        return note

    matrices = backend.matrices()
    hooks = [matrix.register_forward_hook(noting(name)) for name, matrix in matrices.items()]
    try:
        with read_when_used((*matrices.values(), loaded.family.decoder().embed_tokens)):
            "".join(Conversation(model).ask(DESCRIBE_PROMPT, [image], Sampling(max_tokens=1)))
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def wide_products(loaded: LoadedModel, plan: KeepPlan) -> dict[str, float]:
    """Return those of `largest_products` that float16 does not hold with a margin."""
    return {name: size for name, size in largest_products(loaded, plan).items() if size > FLOAT16_MARGIN}


@contextmanager
def read_when_used(modules: Iterable[Any]) -> Iterator[None]:
    """Let linear layers and embedding tables whose weights are placeholders compute with the weights in their files."""
    changed = []
    for module in modules:
        source = getattr(module.weight, "stored", None)
        if source is None or any(module.weight.stride()):
            continue
        module.forward = _linear(module, source) if isinstance(module, nn.Linear) else _embedding(module, source)
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward  # the class's own again


def _linear(module: nn.Linear, source: Matrix) -> Any:
    def forward(states: torch.Tensor) -> torch.Tensor:
        outputs, inputs = source.shape
        step = max(_SLICE // inputs, 1)
        parts = [functional.linear(states, source.rows(at, min(at + step, outputs))) for at in range(0, outputs, step)]
        product = torch.cat(parts, dim=-1)
        return product if module.bias is None else product + module.bias

    return forward


def _embedding(module: Any, source: Matrix) -> Any:
    def forward(ids: torch.Tensor) -> torch.Tensor:
        # The class's own forward, which may scale, on a table of the rows that are asked for.
        used, places = torch.unique(ids, return_inverse=True)
        weight, padding = module.weight, module.padding_idx
        module.weight = nn.Parameter(torch.cat([source.rows(row, row + 1) for row in used.tolist()]), requires_grad=False)
        module.padding_idx = None
        try:
            rows: torch.Tensor = type(module).forward(module, places)
        finally:
            module.weight, module.padding_idx = weight, padding
        return rows

    return forward
