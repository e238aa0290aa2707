"""Two graphs that read one file of weights: what both have is on disk once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

Key = tuple[str, tuple[int, ...], bytes]


def share_weights(path: Path, other: Path) -> None:
    """Let a graph read its weights from the file of `other`, which lies beside it; what that one lacks goes into the graph itself.

    The graph's own file of weights goes. Weights are the same where type, shape and bytes are.
    """
    found = {_key(tensor): tensor for _, tensor in _external(ir.load(other))}
    model, own = ir.load(path), set[Path]()
    for value, tensor in _external(model):
        own.add(Path(tensor.path))
        same = found.get(_key(tensor))
        name = str(value.name)
        if same is None:
            value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, shape=tensor.shape, name=name)
        else:
            value.const_value = ir.ExternalTensor(
                same.location, same.offset, same.length, same.dtype, shape=same.shape, name=name, base_dir=same.base_dir
            )
    ir.save(model, path)
    for file in own:
        file.unlink()


def _external(model: ir.Model) -> Iterator[tuple[ir.Value, ir.ExternalTensor]]:
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value, value.const_value


def _key(tensor: ir.ExternalTensor) -> Key:
    return str(tensor.dtype), tuple(tensor.shape.numpy()), hashlib.sha256(tensor.tobytes()).digest()
