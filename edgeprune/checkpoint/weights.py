"""Weights that stay in their files: large matrices are placeholders while a model is traced, and are read when a graph is written.

A placeholder is a float32 tensor with the shape of the matrix and the memory of a single NaN. Anything computed from it is NaN too,
and is refused when a graph is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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


def is_large(size: tuple[int, ...]) -> bool:
    """Return whether a tensor of this size is a matrix with LARGE elements or more."""
    return len(size) == 2 and size[0] * size[1] >= LARGE


class Matrix(Protocol):
    """A float32 matrix that can be read in slices of rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns: (outputs, inputs) of a linear layer, (tokens, width) of an embedding table."""
        ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the rows from `start` to `stop` [stop - start, columns]."""
        ...


class CheckpointTensor(Matrix, Protocol):
    """A tensor of the model in the files of a checkpoint."""

    @property
    def name(self) -> str:
        """The checkpoint's name of the tensor."""
        ...

    @property
    def size(self) -> tuple[int, ...]:
        """Its shape, of any rank."""
        ...

    @property
    def large(self) -> bool:
        """Whether this is the weight matrix of a layer with LARGE elements or more."""
        ...

    def read(self) -> torch.Tensor:
        """Return the whole tensor."""
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
        return is_large(self.size) and self.kind in _FLOATS and self.name.endswith(".weight")

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the rows from `start` to `stop` in float32. Opens the file each time: pages of an open file count as memory."""
        with safe_open(self.path, framework="pt") as file:
            part: torch.Tensor = file.get_slice(self.name)[start:stop]
        return part.float()

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Return the columns from `start` to `stop` of a matrix in their stored type."""
        with safe_open(self.path, framework="pt") as file:
            part: torch.Tensor = file.get_slice(self.name)[:, start:stop]
        return part

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


def state_of(sources: Iterable[CheckpointTensor], *, whole: bool = False) -> dict[str, torch.Tensor]:
    """Return a state dict in which large matrices are placeholders, unless all is read because `whole`."""
    return {source.name: _placeholder(source.size) if source.large and not whole else source.read() for source in sources}


def placeholder_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a state dict for a model on the device meta: a placeholder for every parameter, zeros for every buffer."""
    names = model.state_dict().keys()  # of parameters and of the buffers that are stored
    buffers = {name: torch.zeros_like(buffer, device="cpu") for name, buffer in model.named_buffers() if name in names}
    return buffers | {name: _placeholder(tuple(parameter.shape)) for name, parameter in model.named_parameters()}


def attach(model: Any, sources: Iterable[CheckpointTensor], state: Mapping[str, torch.Tensor], *, on_disk: bool) -> set[str]:
    """Read the placeholders of `state` among the parameters of a transformers model; return the names of attached sources.

    With `on_disk`, linear layers and the token embedding keep their placeholders: families compute with all other parameters.
    Such parameters know their source, and so do all that are quantized in the checkpoint; `stored_in` finds it.
    """
    multiplied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    multiplied.add(id(model.get_input_embeddings().weight))
    by_address, attached = {address(state[source.name]): source for source in sources}, set[str]()
    for parameter in model.parameters():
        source = by_address.get(address(parameter))
        if source is None or parameter.shape != source.size:  # a part that a converter split off shares the storage
            continue
        placeholder = source.large and not any(parameter.stride())
        kept = placeholder and on_disk and id(parameter) in multiplied
        if placeholder and not kept:
            parameter.data = source.rows(0, source.size[0])
        if kept or (not isinstance(source, StoredTensor) and id(parameter) in multiplied):
            parameter.stored = source
            attached.add(source.name)
    return attached


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
