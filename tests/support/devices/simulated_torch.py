"""A torch device that computes on the CPU and refuses what a GPU would refuse: tensors of two devices in one operation.

It has the name of torch's "meta" device, which every build of torch has, and its tensors have values all the same. As with CUDA, a
number (a CPU tensor of no dimensions) may meet its tensors, and NumPy cannot read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from edgeprune.calibration.collect import run as collect
from edgeprune.families import base

NAME = "meta"
_DEVICE, _CPU = torch.device(NAME), torch.device("cpu")
_BETWEEN = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_MAKE = (torch.tensor, torch.as_tensor)
_NUMBERS = (torch.Tensor.tolist, torch.Tensor.numpy)


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated device; `held` is the CPU tensor with its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> SimulatedTensor:
        """Return a tensor with the shape and strides of `held`."""
        like: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: SimulatedTensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=_DEVICE, **like)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation whose inputs are on the device."""
        return _run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, SimulatedTensor) for tensor in tensors)
    here = any(not isinstance(tensor, SimulatedTensor) and tensor.ndim for tensor in tensors)
    if there and here and func not in _BETWEEN:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} has some on the CPU and some on another.")
    asked = kwargs.get("device")
    target = None if asked is None else torch.device(asked)
    options = dict(kwargs) if target is None else {**kwargs, "device": _CPU}
    result = func(*tree_map(_held, args), **tree_map(_held, options))
    if torch.Tag.inplace_view in func.tags:  # changes the shape: the outer tensor's too
        with no_dispatch():
            func(*args, **kwargs)
    if func._schema.is_mutable and func._schema.name.endswith("_"):
        return args[0]  # written in place
    return tree_map(_placed, result) if (there if target is None else target.type == NAME) else result


def _held(value: Any) -> Any:
    return value.held if isinstance(value, SimulatedTensor) else value


def _placed(value: Any) -> Any:
    return SimulatedTensor(value) if isinstance(value, torch.Tensor) and not isinstance(value, SimulatedTensor) else value


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    # Catches what makes tensors of none.
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    # Catches what torch does in C++ without an operation.
    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in _MAKE and options.get("device") is not None and torch.device(options["device"]).type == NAME:
            made = func(args[0], **{**options, "device": None if isinstance(args[0], torch.Tensor) else _CPU})
            return made.to(_DEVICE)
        if func in _NUMBERS and isinstance(args[0], SimulatedTensor):
            if func is torch.Tensor.numpy:
                raise TypeError("can't convert a device tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
            return args[0].held.tolist()
        return func(*args, **options)


@contextmanager
def simulated_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the device's name, under which models are loaded, tables are made beside their weights, and calibration accepts it."""
    # What families make lies on the CPU for torch's own device of this name, whose tensors have no data.
    monkeypatch.setattr(base, "nullcontext", lambda: _DEVICE)
    monkeypatch.setattr(collect, "check_device", lambda device: None)
    read = safetensors.torch.load_file  # reads into the memory of devices that it knows
    monkeypatch.setattr(
        safetensors.torch, "load_file", lambda path, device: {name: each.to(device) for name, each in read(path).items()}
    )
    with _Functions(), _Operations():  # type: ignore[no-untyped-call]
        yield NAME
