"""Weights that stay in their files: large matrices are placeholders while a model is traced, and are read when a graph is written.

A placeholder is a float32 tensor with the shape of the matrix and the memory of a single NaN. Anything computed from it is NaN too,
and is refused when a graph is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from edgeprune.checkpoint.formats import weight_files
from edgeprune.errors import UnsupportedModelError

LARGE = 1 << 20  # elements; the graph optimizer reads constants of up to 8192
_FLOATS = ("F64", "F32", "F16", "BF16")
_SUPPORTED = (*_FLOATS, "I64", "I32", "BOOL")  # the integers are positions and masks


class Matrix(Protocol):
    """A float32 matrix that can be read in slices of rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns: (outputs, inputs) of a linear layer, (tokens, width) of an embedding table."""
        ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the rows from `start` to `stop` [stop - start, columns]."""
        ...


@dataclass(frozen=True)
class InMemoryMatrix:
    """A matrix in memory."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.tensor.shape[0], self.tensor.shape[1]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the rows from `start` to `stop`."""
        return self.tensor[start:stop]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file. `kind`: the format's name of its type, such as BF16."""

    path: Path
    name: str
    kind: str
    size: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, if the tensor is a matrix."""
        rows, columns = self.size
        return rows, columns

    @property
    def large(self) -> bool:
        """Whether this is the weight matrix of a layer with LARGE elements or more."""
        count = self.size[0] * self.size[1] if len(self.size) == 2 else 0
        return count >= LARGE and self.kind in _FLOATS and self.name.endswith(".weight")

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the rows from `start` to `stop` in float32. Opens the file each time: pages of an open file count as memory."""
        with safe_open(self.path, framework="pt") as file:
            part: torch.Tensor = file.get_slice(self.name)[start:stop]
        return part.float()

    def read(self) -> torch.Tensor:
        """Return the tensor in its stored type."""
        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.name)
        return tensor.clone()


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Return the tensors in the safetensors files of a model folder, read from the headers alone.

    Raises UnsupportedModelError if a file is missing or broken, or holds a quantized tensor.
    """
    stored = [tensor for path in weight_files(folder) for tensor in _header(path)]
    for tensor in stored:
        if tensor.kind not in _SUPPORTED:
            raise UnsupportedModelError(
                f"{tensor.name} in {tensor.path} is of type {tensor.kind}: this checkpoint is quantized.",
                hint="Export the original weights; EdgePrune quantizes by itself.",
            )
    return stored


def state_of(stored: list[StoredTensor]) -> dict[str, torch.Tensor]:
    """Return a state dict in which large matrices are placeholders."""
    return {tensor.name: _placeholder(tensor.size) if tensor.large else tensor.read() for tensor in stored}


def attach(model: Any, stored: list[StoredTensor], state: Mapping[str, torch.Tensor]) -> None:
    """Attach stored tensors to the parameters of a transformers model that are placeholders of `state`; `stored_in` finds them.

    Only linear layers and the token embedding keep placeholders. Families compute with other parameters, which are read now.
    """
    kept = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    kept.add(id(model.get_input_embeddings().weight))
    sources = {address(state[tensor.name]): tensor for tensor in stored if tensor.large}
    for parameter in model.parameters():
        source = sources.get(address(parameter))
        if source is None:
            continue
        assert parameter.shape == source.size
        if id(parameter) in kept:
            parameter.stored = source
        else:
            parameter.data = source.rows(0, source.size[0])


def stored_in(module: nn.Module) -> dict[int, Matrix]:
    """Return the sources of a module's parameters that `attach` noted, keyed by `address`."""
    found: dict[int, Any] = {address(parameter): getattr(parameter, "stored", None) for parameter in module.parameters()}
    return {key: source for key, source in found.items() if source is not None}


def address(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's storage; live tensors share it only if they are views of one storage."""
    return tensor.untyped_storage().data_ptr()


def _placeholder(size: tuple[int, ...]) -> torch.Tensor:
    return torch.full((1,), float("nan")).expand(size)


def _header(path: Path) -> Iterator[StoredTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                yield StoredTensor(path, name, str(part.get_dtype()), tuple(part.get_shape()))
    except (OSError, SafetensorError) as error:
        raise UnsupportedModelError(f"{path} is not a whole safetensors file: {error}.", hint="Download it again.") from error
