"""Small constants of a graph, stored or folded through the operators that exporters put around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

if TYPE_CHECKING:
    from edgeprune.lint.graphs import Node, Scope

LARGEST = 1 << 20  # elements; zero points of blocks are the largest constants that a rule reads
_LITERALS = ("value_int", "value_ints", "value_float", "value_floats")


def read_tensor(tensor: TensorProto, folder: Path) -> np.ndarray | None:
    """Return a stored tensor, from its file beside the graph where it is external; None if it is large or cannot be read."""
    if int(np.prod(tensor.dims, dtype=np.int64)) > LARGEST:
        return None
    try:
        if tensor.data_location == TensorProto.EXTERNAL:
            copy = TensorProto()
            copy.CopyFrom(tensor)
            load_external_data_for_tensor(copy, str(folder))
            tensor = copy
        return np.asarray(numpy_helper.to_array(tensor))
    except (OSError, ValueError, TypeError, checker.ValidationError):
        return None


def constant(scope: Scope, name: str) -> np.ndarray | None:
    """Return a value that does not depend on inputs or shapes, or None.

    Folds Constant, Identity, Cast, Reshape, Squeeze, Unsqueeze and Concat, as TensorRT's parser does for weights.
    """
    if not name:
        return None
    if scope.is_stored(name):
        return scope.initializer(name)
    node = scope.producer(name)
    if node is None or not node.standard:
        return None
    if node.operator == "Constant":
        return _literal(node)
    fold = _FOLDS.get(node.operator)
    arguments = [constant(node.scope, item) for item in node.inputs] if fold else []
    if fold is None or any(item is None for item in arguments):
        return None
    try:
        return fold(node, [item for item in arguments if item is not None])
    except (TypeError, ValueError, IndexError):
        return None


def is_constant(scope: Scope, name: str) -> bool:
    """Tell whether a value depends on initializers and constants alone, whatever its size."""
    seen: set[str] = set()
    waiting = [(scope, name)]
    while waiting:
        at, item = waiting.pop()
        if item in seen or at.is_stored(item):
            continue
        seen.add(item)
        node = at.producer(item)
        if node is None or any(True for _ in node.bodies()) or (not node.inputs and node.operator != "Constant"):
            return False
        if node.operator in ("Shape", "Size"):
            return False
        waiting += [(node.scope, source) for source in node.inputs if source]
    return True


def _literal(node: Node) -> np.ndarray | None:
    tensor = node.attribute("value")
    if tensor is not None:
        return read_tensor(tensor, node.scope.folder)
    for name in _LITERALS:
        value = node.attribute(name)
        if value is not None:
            return np.asarray(value)
    return None


def _cast(node: Node, arguments: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(arguments[0].astype(helper.tensor_dtype_to_np_dtype(node.attribute("to"))))


def _squeeze(node: Node, arguments: Sequence[np.ndarray]) -> np.ndarray:
    axes = arguments[1].tolist() if len(arguments) > 1 else node.attribute("axes")
    return np.squeeze(arguments[0], tuple(axes) if axes is not None else None)


def _unsqueeze(node: Node, arguments: Sequence[np.ndarray]) -> np.ndarray:
    axes: Any = arguments[1].tolist() if len(arguments) > 1 else node.attribute("axes")
    return np.expand_dims(arguments[0], tuple(axes))


_FOLDS: dict[str, Callable[[Node, Sequence[np.ndarray]], np.ndarray]] = {
    "Identity": lambda node, arguments: arguments[0],
    "Cast": _cast,
    "Reshape": lambda node, arguments: arguments[0].reshape(arguments[1].tolist()),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": lambda node, arguments: np.concatenate(arguments, node.attribute("axis", 0)),
}
