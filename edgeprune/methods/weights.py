"""What methods learned, as tensors: how they are written to the bytes beside a plan, and read and checked again."""

from __future__ import annotations

import json
from typing import Any, Protocol, runtime_checkable

import torch

from edgeprune.errors import PlanError
from edgeprune.plan import Weights

SCHEMA_VERSION = 1


@runtime_checkable
class Taught(Protocol):
    """A method that ranks by weights. `header`: that of its weights."""

    header: dict[str, Any]

    @property
    def width(self) -> int:
        """The length of the rows that the weights are for."""
        ...

    def width_in(self, parts: Any) -> int:
        """Return the length of these rows in a model, given its `edgeprune.families.base.DecoderParts`."""
        ...


def pack(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> Weights:
    """Return weights with these tensors. `header`: the `weights_sha256` of the model, and what else the method states."""
    from safetensors.torch import save

    rows = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    return Weights.of(save(rows, {"edgeprune": json.dumps({"schema_version": SCHEMA_VERSION, **header})}))


def unpack(weights: Weights, again: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return header and tensors of weights. All tensors are float32 and finite, and the header names a model.

    Raises PlanError, with the hint `again`, for what was not packed by this version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    assert weights.content is not None
    try:
        length = int.from_bytes(weights.content[:8], "little")
        header = json.loads(json.loads(weights.content[8 : 8 + length])["__metadata__"]["edgeprune"])
        tensors = load(weights.content)
        well = header["schema_version"] == SCHEMA_VERSION and isinstance(header["weights_sha256"], str)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PlanError(f"The weights are not readable: {error!r}.", hint=again) from error
    if not well or any(each.dtype != torch.float32 or not bool(torch.isfinite(each).all()) for each in tensors.values()):
        raise PlanError("The weights are not those of a method, or of another version.", hint=again)
    return header, tensors
