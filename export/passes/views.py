"""Equal views of an image one after another, so that a vision encoder holds the activations of one view.

Attention of an encoder stays within a view, and all else is done patch by patch. So the nodes up to a cut become the body of a Scan
over the views. It reads the weights once a view, which costs less than it saves: hidden states of one view fit the caches more
often. Integers get the range of their view instead of one for all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.passes.common.shape_inference import infer_shapes
from onnx_ir.tape import Tape

from edgeprune.export.passes.replacement import reshaped, sizes_of
from edgeprune.targets import Lowering

_ELEMENTWISE = ("Add", "Cast", "Div", "Erf", "Gelu", "Max", "Mul", "Neg", "Sigmoid", "Sub", "Tanh")
_REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")
_LAST_AXIS = ("LayerNormalization", "RMSNormalization", "Softmax")
_BY_WEIGHTS = ("DynamicQuantizeLinear", "Gemm", "MatMul", "MatMulInteger", "MatMulNBits")


def encode_views_in_turn(model: ir.Model, lowering: Lowering) -> None:
    """Make a Scan of each run of nodes in which rows of different views do not meet.

    Rows are [views * patches, width], and MultiHeadAttention takes [views, patches, width].
    """
    counts = dict.fromkeys(sizes_of(node.inputs[0])[0] for node in model.graph if _attends_in_turn(node, lowering))
    if not counts:
        return
    infer_shapes(model, check_type=False, strict_mode=False)
    for views in counts:
        for number, run in enumerate(_runs(model.graph, views)):
            if any(_attends_in_turn(node, lowering) for node in run.nodes):
                _Scan(model.graph, run, f"views_{views}_{number}").make()
    RemoveUnusedNodesPass()(model)  # and constants of all views


def write_with_own_weights(path: Path, owning: Path) -> bool:
    """Write the graph at `path` to `owning`, on the same weights file, so that Scans own the integers that they multiply by.

    CPUs without 8-bit products need it: ONNX Runtime stores integer weights anew for them, but only those that a graph has itself.
    Other CPUs do not: ONNX Runtime keeps the file's pages of such weights beside its copies. Returns False, without a file, if no
    Scan multiplies by integers.
    """
    model, found = ir.load(path), False
    for body in (node.attributes["body"].as_graph() for node in model.graph if node.op_type == "Scan"):
        for weight in {node.inputs[1] for node in body if node.op_type == "MatMulInteger"}:
            assert weight is not None and all(reader.graph is body for reader in weight.consumers())
            del model.graph.initializers[str(weight.name)]
            body.register_initializer(weight)
            found = True
    if found:
        ir.save(model, owning)
    return found


def _attends_in_turn(node: ir.Node, lowering: Lowering) -> bool:
    sizes = sizes_of(node.inputs[0]) if node.op_type == "MultiHeadAttention" else ()
    return len(sizes) == 3 and sizes[0] > 1 and lowering.in_turn(sizes[1])


def _runs(graph: ir.Graph, views: int) -> list[_Run]:
    # Runs of neighbours in the graph that act on each view alone.
    found, run = list[_Run](), _Run(views)
    for node in graph:
        if not run.takes(node):
            found.append(run.without_local_end())
            run = _Run(views)
            run.takes(node)
    return [*found, run.without_local_end()]


@dataclass
class _Run:
    """Nodes that act on each view alone.

    `moving`: values that have what belongs to the views one behind the other along their first axis. `local`: those that have no
    such axis and differ between views, such as the range of integers.
    """

    views: int
    nodes: list[ir.Node] = field(default_factory=list)
    moving: dict[ir.Value, None] = field(default_factory=dict)
    local: set[ir.Value] = field(default_factory=set)

    def takes(self, node: ir.Node) -> bool:
        """Add a node if it acts on each view alone."""
        given = [value for value in node.inputs if value is not None]
        moving = [value for value in given if self._moves(value, node)]
        if any(value.const_value is None and value not in self.local for value in given if value not in moving):
            return False
        if not (self._stays_within(node, moving) if moving else self._is_of_local(node)):
            return False
        self.nodes.append(node)
        self.moving |= dict.fromkeys(moving)
        ranges = node.op_type == "DynamicQuantizeLinear"
        for index, value in enumerate(node.outputs):
            if moving and not (ranges and index):
                self.moving[value] = None
            else:
                self.local.add(value)
        return True

    def without_local_end(self) -> _Run:
        """Return the run up to where nothing local leaves it."""
        inside = set(self.nodes)
        for index, node in enumerate(self.nodes):
            if any(value in self.local and _leaves(value, inside) for value in node.outputs):
                shorter = _Run(self.views)
                for each in self.nodes[:index]:
                    shorter.takes(each)
                return shorter.without_local_end()
        return self

    def of_one(self, value: ir.Value) -> tuple[int, ...]:
        """Return the shape of a moving value when there is one view."""
        first, *others = sizes_of(value)
        return (first // self.views, *others)

    def same_in_all(self, value: ir.Value) -> np.ndarray | None:
        """Return what a moving constant has for each view, if that is the same for all."""
        if value.const_value is None:
            return None
        parts = value.const_value.numpy().reshape(self.views, *self.of_one(value))
        return parts[0] if all(np.array_equal(part, parts[0]) for part in parts) else None

    def rows_of_one(self, node: ir.Node) -> np.ndarray | None:
        """Return the rows of a view that a Gather takes from each view, if they are the same."""
        indices = node.inputs[1].const_value if node.op_type == "Gather" and node.inputs[1] is not None else None
        if indices is None or len(indices.shape) != 1 or indices.size % self.views or node.attributes.get_int("axis", 0) != 0:
            return None
        height = self.of_one(node.inputs[0])[0] if node.inputs[0] is not None else 0
        rows = indices.numpy().reshape(self.views, -1) - np.arange(self.views)[:, None] * height
        return rows[0] if rows.min() >= 0 and rows.max() < height and (rows == rows[0]).all() else None

    def _moves(self, value: ir.Value, node: ir.Node) -> bool:
        sizes = sizes_of(value)
        if value.const_value is not None:  # a constant beside what moves, with rows of its own for each view
            beside = sizes_of(node.outputs[0])
            return node.op_type in (*_ELEMENTWISE, "Concat") and len(sizes) == len(beside) > 1 and sizes[0] == beside[0] > 1
        # Whatever enters is taken in as many parts: nothing in a run looks beyond its part, so what the parts are does not matter.
        return value in self.moving or (value not in self.local and len(sizes) > 1 and sizes[0] % self.views == 0)

    def _stays_within(self, node: ir.Node, moving: list[ir.Value]) -> bool:
        kind, first, sizes = node.op_type, node.inputs[0], sizes_of(node.outputs[0])
        if any(not sizes_of(value) or sizes_of(value)[0] % self.views for value in (*moving, node.outputs[0])):
            return False
        # Values of other ranks would be broadcast along another axis.
        alike = all(sizes_of(value)[0] == sizes[0] and len(sizes_of(value)) == len(sizes) for value in moving)
        if kind in _ELEMENTWISE or kind == "Concat":
            return alike and (kind != "Concat" or _axis(node, 0) != 0)
        if kind == "MultiHeadAttention":
            return len(moving) == len(node.inputs) == 3
        if kind == "MatMul" and len(moving) == 2:
            return alike and len(sizes) > 2
        return moving == [first] and (self.rows_of_one(node) is not None or _leaves_first_axis(node))

    def _is_of_local(self, node: ir.Node) -> bool:
        return node.op_type in _ELEMENTWISE and any(value in self.local for value in node.inputs)


def _axis(node: ir.Node, default: int) -> int:
    axis = node.attributes.get_int("axis", default)
    return axis if axis >= 0 else axis + len(sizes_of(node.inputs[0]))


def _leaves_first_axis(node: ir.Node) -> bool:
    # Whether what a node does to its first input does not go along the first axis, or is the same for any number of views.
    kind, rank = node.op_type, len(sizes_of(node.inputs[0]))
    if kind == "Slice":
        axes = node.inputs[3].const_value if len(node.inputs) > 3 and node.inputs[3] is not None else None
        return axes is not None and all(axis % rank for axis in axes.numpy().reshape(-1).tolist())
    if kind == "Transpose":
        return "perm" in node.attributes and node.attributes["perm"].as_ints()[0] == 0
    if kind in _REDUCTIONS:
        axes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
        return axes is not None and all(axis % rank for axis in axes.numpy().reshape(-1).tolist())
    if kind in _LAST_AXIS:
        return _axis(node, -1) == rank - 1 > 0
    return kind in ("Reshape", *_BY_WEIGHTS) or (kind == "Split" and _axis(node, 0) != 0)


class _Scan:
    # Makes a Scan of a run of nodes, which become its body.

    def __init__(self, graph: ir.Graph, run: _Run, name: str) -> None:
        self._graph, self._run, self._name = graph, run, name
        self._inside, self._before, self._after = set(run.nodes), Tape(), Tape()

    def make(self) -> None:
        """Replace the run."""
        nodes, rows = self._run.nodes, {node: self._run.rows_of_one(node) for node in self._run.nodes}
        entering = [value for value in self._run.moving if value.producer() not in self._inside]
        moving = [value for value in entering if not self._took_constant(value)]
        stacks = [reshaped(self._before, value, self._stacked(value), f"{self._name}.{value.name}.views") for value in moving]
        taken = [self._one(value) for value in moving]
        leaving = [value for node in nodes for value in node.outputs if _leaves(value, self._inside)]
        scanned = [ir.Value(name=f"{value.name}.views", type=value.type, shape=ir.Shape(self._stacked(value))) for value in leaving]
        for value, stack in zip(leaving, scanned, strict=True):
            self._hand_on(value, reshaped(self._after, stack, sizes_of(value), str(stack.name)))
        for node in nodes:
            self._narrow(node, rows[node])
        place = ir.node("Identity", [])
        self._graph.insert_before(nodes[0], place)
        self._graph.remove(nodes)
        body = ir.Graph(taken, leaving, nodes=nodes, name=self._name)
        scan = ir.node("Scan", stacks, {"body": body, "num_scan_inputs": len(stacks)}, outputs=scanned, name=self._name)
        self._graph.insert_after(place, [*self._before.nodes, scan, *self._after.nodes])
        self._graph.remove(place)
        for initializer in (*self._before.initializers, *self._after.initializers):
            self._graph.register_initializer(initializer)

    def _stacked(self, value: ir.Value) -> tuple[int, ...]:
        return (self._run.views, *self._run.of_one(value))

    def _took_constant(self, value: ir.Value) -> bool:
        # Whether the body reads a constant that is the same for all views instead of this one.
        part = self._run.same_in_all(value)
        if part is None:
            return False
        self._read_instead(value, self._before.initializer(ir.tensor(part, name=f"{self._name}.{value.name}")))
        return True

    def _one(self, value: ir.Value) -> ir.Value:
        one = ir.Value(name=f"{self._name}.{value.name}", type=value.type, shape=ir.Shape(self._run.of_one(value)))
        self._read_instead(value, one)
        return one

    def _read_instead(self, value: ir.Value, other: ir.Value) -> None:
        for node, index in list(value.uses()):
            if node in self._inside:
                node.replace_input_with(index, other)

    def _hand_on(self, value: ir.Value, whole: ir.Value) -> None:
        # To whatever reads a value of the run behind it.
        whole.name = value.name
        for node, index in list(value.uses()):
            if node not in self._inside:
                node.replace_input_with(index, whole)
        for index, output in enumerate(self._graph.outputs):
            if output is value:
                self._graph.outputs[index] = whole

    def _narrow(self, node: ir.Node, rows: np.ndarray | None) -> None:
        # To the shapes of one view, and the rows that a Gather takes from it.
        output = node.outputs[0]
        constant = np.array(self._run.of_one(output), np.int64) if node.op_type == "Reshape" else rows
        for value in node.outputs:
            value.shape = ir.Shape(self._run.of_one(value)) if value in self._run.moving else value.shape
            value.name = f"{self._name}.{value.name}"
        if constant is not None:
            given = ir.tensor(constant, name=f"{output.name}.{node.op_type.lower()}")
            node.replace_input_with(1, self._before.initializer(given))


def _leaves(value: ir.Value, inside: set[ir.Node]) -> bool:
    return value.is_graph_output() or any(node not in inside for node in value.consumers())
