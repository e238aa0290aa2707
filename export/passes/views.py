"""Equal views of an image one after another, so that a vision encoder holds the activations of one view.

Attention of an encoder stays within a view, and all else is done patch by patch. So the layers up to a cut become the body of a
Scan over the views. It reads the weights once a view, which costs less than it saves: hidden states of one view fit the caches more
often. Integers get the range of their view instead of one for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.passes.common.shape_inference import infer_shapes
from onnx_ir.tape import Tape

from edgeprune.export.passes.replacement import reshaped, sizes_of

LEAST = 512  # patches of a view: of fewer, all views hold little, and products of few rows wait for the weights
_ELEMENTWISE = ("Add", "Cast", "Div", "Erf", "Gelu", "Max", "Mul", "Neg", "Sigmoid", "Sub", "Tanh")
_REDUCTIONS = ("ReduceMax", "ReduceMin")
_NORMS = ("LayerNormalization", "RMSNormalization")
_PRODUCTS = ("DynamicQuantizeLinear", "Gemm", "MatMul", "MatMulInteger", "MatMulNBits")  # of rows with weights


def encode_views_in_turn(model: ir.Model) -> None:
    """Make a Scan of each run of nodes in which rows of different views do not meet.

    Rows are [views * patches, width], and MultiHeadAttention takes [views, patches, width].
    """
    layouts = dict.fromkeys(sizes_of(node.inputs[0])[:2] for node in model.graph if node.op_type == "MultiHeadAttention")
    several = [_Layout(*sizes) for sizes in layouts if len(sizes) == 2 and sizes[0] > 1 and sizes[1] >= LEAST]
    if several:
        infer_shapes(model, check_type=False, strict_mode=False)
    for layout in several:
        for number, run in enumerate(_runs(model.graph, layout)):
            _Scan(model.graph, run, layout, f"views_{layout.views}_{layout.patches}_{number}").make()
    if several:
        RemoveUnusedNodesPass()(model)  # and constants of all views


@dataclass(frozen=True)
class _Layout:
    views: int
    patches: int

    def has_rows(self, value: ir.Value) -> bool:
        """Whether a value has the rows of all views, as rows [views * patches, width] or as [views, patches, width]."""
        sizes = sizes_of(value)
        return sizes[:-1] in ((self.views * self.patches,), (self.views, self.patches))

    def of_one(self, value: ir.Value) -> tuple[int, ...]:
        """Return the shape of a value with rows when there is one view."""
        sizes = sizes_of(value)
        return (self.patches, sizes[1]) if len(sizes) == 2 else (1, *sizes[1:])

    def same_in_all(self, value: ir.Value) -> np.ndarray | None:
        """Return what a constant with rows has for each view, if that is the same for all."""
        if value.const_value is None:
            return None
        parts = value.const_value.numpy().reshape(self.views, *self.of_one(value))
        return parts[0] if all(np.array_equal(part, parts[0]) for part in parts) else None

    def order(self, node: ir.Node) -> np.ndarray | None:
        """Return the order [patches] that a Gather brings the rows of each view into, if it is the same for all."""
        indices = node.inputs[1].const_value if node.op_type == "Gather" and node.inputs[1] is not None else None
        if indices is None or indices.size != self.views * self.patches or node.attributes.get_int("axis", 0) != 0:
            return None
        orders = indices.numpy().reshape(self.views, self.patches) - np.arange(self.views)[:, None] * self.patches
        within = orders.min() >= 0 and orders.max() < self.patches
        return orders[0] if within and (orders == orders[0]).all() else None

    def stays_within(self, node: ir.Node, local: set[ir.Value]) -> bool:
        """Whether a node acts on each view alone. `local`: values without rows that depend on the view, such as ranges."""
        given = [value for value in node.inputs if value is not None]
        moving = [value for value in given if self.has_rows(value)]
        if any(value.const_value is None and value not in local for value in given if value not in moving):
            return False
        kind, first, output = node.op_type, node.inputs[0], node.outputs[0]
        if kind == "MultiHeadAttention":
            return len(given) == 3 and all(value in moving and len(sizes_of(value)) == 3 for value in given)
        if kind == "Reshape":
            return first in moving and self.has_rows(output) and sizes_of(output)[-1] == sizes_of(first)[-1]
        if kind in _ELEMENTWISE:
            return self.has_rows(output) if moving else any(value in local for value in given)
        alone = kind in (*_NORMS, *_PRODUCTS) or _along_last_axis(node) or self.order(node) is not None
        return alone and moving == [first] and len(sizes_of(first)) == 2


def _along_last_axis(node: ir.Node) -> bool:
    # A Split, or a reduction that keeps the axis, of two axes.
    if node.op_type == "Split":
        return node.attributes.get_int("axis", 0) in (-1, 1)
    axes = (
        node.inputs[1].const_value if node.op_type in _REDUCTIONS and len(node.inputs) > 1 and node.inputs[1] is not None else None
    )
    return axes is not None and axes.numpy().tolist() in ([-1], [1]) and len(sizes_of(node.outputs[0])) == 2


def _runs(graph: ir.Graph, layout: _Layout) -> list[list[ir.Node]]:
    # Runs of neighbours in the graph that act on each view alone, those with an attention in them.
    found, run, local = list[list[ir.Node]](), list[ir.Node](), set[ir.Value]()
    for node in [*graph, None]:
        if node is not None and layout.stays_within(node, local):
            run.append(node)
            local |= {value for value in node.outputs if not layout.has_rows(value)}
        else:
            found.append(_without_local_ends(run, local))
            run, local = [], set()
    return [run for run in found if any(node.op_type == "MultiHeadAttention" for node in run)]


def _without_local_ends(run: list[ir.Node], local: set[ir.Value]) -> list[ir.Node]:
    # The run up to where nothing but rows leaves it.
    inside = set(run)
    for index, node in enumerate(run):
        if any(value in local and _leaves(value, inside) for value in node.outputs):
            return _without_local_ends(run[:index], local)
    return run


class _Scan:
    # Makes a Scan of a run of nodes, which becomes its body.

    def __init__(self, graph: ir.Graph, run: list[ir.Node], layout: _Layout, name: str) -> None:
        self._graph, self._run, self._layout, self._name = graph, run, layout, name
        self._inside, self._before, self._after = set(run), Tape(), Tape()

    def make(self) -> None:
        """Replace the run."""
        read = dict.fromkeys(value for node in self._run for value in node.inputs if value is not None)
        entering = [value for value in read if self._layout.has_rows(value) and value.producer() not in self._inside]
        moving = [value for value in entering if not self._took_constant(value)]
        stacks = [reshaped(self._before, value, self._stacked(value), f"{self._name}.{value.name}.views") for value in moving]
        taken = [self._one(value) for value in moving]
        leaving = [value for node in self._run for value in node.outputs if _leaves(value, self._inside)]
        scanned = [ir.Value(name=f"{value.name}.views", type=value.type, shape=ir.Shape(self._stacked(value))) for value in leaving]
        for value, stack in zip(leaving, scanned, strict=True):
            self._hand_on(value, reshaped(self._after, stack, sizes_of(value), str(stack.name)))
        for node in self._run:
            self._narrow(node)
        place = ir.node("Identity", [])
        self._graph.insert_before(self._run[0], place)
        self._graph.remove(self._run)
        body = ir.Graph(taken, leaving, nodes=self._run, name=self._name)
        scan = ir.node("Scan", stacks, {"body": body, "num_scan_inputs": len(stacks)}, outputs=scanned, name=self._name)
        self._graph.insert_after(place, [*self._before.nodes, scan, *self._after.nodes])
        self._graph.remove(place)
        for initializer in (*self._before.initializers, *self._after.initializers):
            self._graph.register_initializer(initializer)

    def _stacked(self, value: ir.Value) -> tuple[int, ...]:
        return (self._layout.views, *self._layout.of_one(value))

    def _took_constant(self, value: ir.Value) -> bool:
        # Whether the body reads a constant that is the same for all views instead of this one.
        part = self._layout.same_in_all(value)
        if part is None:
            return False
        self._read_instead(value, self._before.initializer(ir.tensor(part, name=f"{self._name}.{value.name}")))
        return True

    def _one(self, value: ir.Value) -> ir.Value:
        one = ir.Value(name=f"{self._name}.{value.name}", type=value.type, shape=ir.Shape(self._layout.of_one(value)))
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

    def _narrow(self, node: ir.Node) -> None:
        # To the shapes of one view.
        constant = (
            np.array(self._layout.of_one(node.outputs[0]), np.int64) if node.op_type == "Reshape" else self._layout.order(node)
        )
        for value in node.outputs:
            value.shape = ir.Shape(self._layout.of_one(value)) if self._layout.has_rows(value) else value.shape
            value.name = f"{self._name}.{value.name}"
        if constant is not None:
            given = ir.tensor(constant, name=f"{node.outputs[0].name}.{node.op_type.lower()}")
            node.replace_input_with(1, self._before.initializer(given))


def _leaves(value: ir.Value, inside: set[ir.Node]) -> bool:
    return value.is_graph_output() or any(node not in inside for node in value.consumers())
