"""A view of an ONNX graph for the lint: nodes with their scopes, types and shapes of values, and small constants.

Weights stay on disk; only constants that a rule requests are read. Bodies of If, Loop and Scan are nested scopes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    checker,
    helper,
    inliner,
    numpy_helper,
    shape_inference,
)
from onnx.external_data_helper import load_external_data_for_tensor

from edgeprune.errors import BundleError

Dim = int | str  # a length, a name or an expression; an empty string if unknown

LARGEST = 1 << 20  # elements; block-wise zero points are the largest constants that a rule reads

ONNX_DOMAINS = ("", "ai.onnx")


def read_tensor(tensor: TensorProto, folder: Path) -> np.ndarray | None:
    """Return a stored tensor, loading external data from `folder`; None if it is large or cannot be read."""
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


@dataclass(frozen=True)
class Value:
    """A tensor by name: its element type (a name of TensorProto.DataType, empty if unknown) and shape (None if unknown)."""

    name: str
    element: str
    shape: tuple[Dim, ...] | None


@dataclass
class Scope:
    """A graph or body: its nodes, initializers and declared values, and the `outer` scope."""

    proto: GraphProto
    folder: Path
    outer: Scope | None = None
    producers: dict[str, NodeProto] = field(default_factory=dict)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    arguments: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.producers = {output: node for node in self.proto.node for output in node.output if output}
        self.initializers = {tensor.name: tensor for tensor in self.proto.initializer}
        self.arguments = frozenset(item.name for item in self.proto.input)
        declared = (*self.proto.value_info, *self.proto.input, *self.proto.output)
        self.values = {info.name: _value_of(info) for info in declared}
        for tensor in self.proto.initializer:
            self.values[tensor.name] = Value(tensor.name, TensorProto.DataType.Name(tensor.data_type), tuple(tensor.dims))

    def owner(self, name: str) -> Scope | None:
        """Return the innermost scope that defines a value, from here outwards; None for an undeclared name."""
        if name in self.producers or name in self.initializers or name in self.arguments:
            return self
        return self.outer.owner(name) if self.outer else None

    def value(self, name: str) -> Value:
        """Return type and shape of a value as far as known."""
        owner = self.owner(name) or self
        return owner.values.get(name, Value(name, "", None))

    def producer(self, name: str) -> Node | None:
        """Return the node that computes a value, in this or an outer scope."""
        owner = self.owner(name)
        return Node(owner.producers[name], owner) if owner and name in owner.producers else None

    def initializer(self, name: str) -> np.ndarray | None:
        """Return an initializer's tensor; None if there is none or it is large."""
        owner = self.owner(name)
        return read_tensor(owner.initializers[name], owner.folder) if owner and name in owner.initializers else None

    def is_stored(self, name: str) -> bool:
        """Return whether a value is an initializer."""
        owner = self.owner(name)
        return owner is not None and name in owner.initializers


@dataclass(frozen=True)
class Node:
    """A node in its scope; omitted inputs and outputs are empty strings."""

    proto: NodeProto
    scope: Scope

    @property
    def name(self) -> str:
        """The node's name, or the name of its first output if it has none."""
        return self.proto.name or next((name for name in self.proto.output if name), self.proto.op_type)

    @property
    def operator(self) -> str:
        """The operator, prefixed with its domain unless that is ONNX's."""
        return self.proto.op_type if self.standard else f"{self.proto.domain}::{self.proto.op_type}"

    @property
    def standard(self) -> bool:
        """Whether the operator is in ONNX's own domain."""
        return self.proto.domain in ONNX_DOMAINS

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs."""
        return tuple(self.proto.output)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs."""
        return tuple(self.proto.input)

    def has_input(self, index: int) -> bool:
        """Return whether an optional input is present."""
        return index < len(self.proto.input) and bool(self.proto.input[index])

    def has_output(self, index: int) -> bool:
        """Return whether an optional output is present."""
        return index < len(self.proto.output) and bool(self.proto.output[index])

    def input(self, index: int) -> Value:
        """Return type and shape of an input as far as known; an unnamed value if it is omitted."""
        return self.scope.value(self.proto.input[index]) if self.has_input(index) else Value("", "", None)

    def output(self, index: int = 0) -> Value:
        """Return type and shape of an output as far as known; an unnamed value if it is omitted."""
        return self.scope.value(self.proto.output[index]) if self.has_output(index) else Value("", "", None)

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute's value (strings as str), or the default."""
        for attribute in self.proto.attribute:
            if attribute.name == name:
                value = helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def bodies(self) -> Iterator[GraphProto]:
        """Yield the graphs inside the node, in the order of its attributes."""
        for attribute in self.proto.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield attribute.g
            yield from attribute.graphs


@dataclass(frozen=True)
class Graph:
    """A graph file: `name` in findings, `opset` of ONNX's domain, `unread`: why shape inference failed, or empty."""

    name: str
    opset: int
    main: Scope
    nodes: tuple[Node, ...]
    scopes: tuple[Scope, ...]
    unread: str = ""

    @property
    def inputs(self) -> tuple[Value, ...]:
        """Inputs of the graph, without initializers."""
        return tuple(self.main.values[item.name] for item in self.main.proto.input if item.name not in self.main.initializers)

    @property
    def outputs(self) -> tuple[Value, ...]:
        """The outputs of the graph."""
        return tuple(self.main.values[item.name] for item in self.main.proto.output)


def load_graph(path: Path, name: str = "") -> Graph:
    """Read a graph without its external data and infer types and shapes; raise BundleError if it cannot be parsed."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        raise BundleError(f"Cannot read the graph {path}: {error}.", hint="Export the bundle again.") from error
    return view_graph(model, path.parent, name or path.name)


def view_graph(model: ModelProto, folder: Path, name: str) -> Graph:
    """Return the view of a model whose external data are in `folder`."""
    model, unread = _infer(model)
    main = Scope(model.graph, folder)
    scopes = [main]
    nodes = list(_walk(main, scopes))
    opset = max((entry.version for entry in model.opset_import if entry.domain in ONNX_DOMAINS), default=0)
    return Graph(name, opset, main, tuple(nodes), tuple(scopes), unread)


def _infer(model: ModelProto) -> tuple[ModelProto, str]:
    # Inference fails for models above 2 GB and for invalid ones; these keep their declared shapes.
    try:
        inlined = inliner.inline_local_functions(model) if model.functions else model
        return shape_inference.infer_shapes(inlined, data_prop=True), ""
    except (shape_inference.InferenceError, ValueError, RuntimeError) as error:
        return model, str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _walk(scope: Scope, scopes: list[Scope]) -> Iterator[Node]:
    # Nested scopes are appended to `scopes`.
    for proto in scope.proto.node:
        node = Node(proto, scope)
        yield node
        for body in node.bodies():
            inner = Scope(body, scope.folder, scope)
            scopes.append(inner)
            yield from _walk(inner, scopes)


def _value_of(info: ValueInfoProto) -> Value:
    tensor = info.type.tensor_type
    if not info.type.HasField("tensor_type"):
        return Value(info.name, "", None)
    element = TensorProto.DataType.Name(tensor.elem_type) if tensor.elem_type else ""
    if not tensor.HasField("shape"):
        return Value(info.name, element, None)
    return Value(
        info.name, element, tuple(item.dim_value if item.HasField("dim_value") else item.dim_param for item in tensor.shape.dim)
    )
