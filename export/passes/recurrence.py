"""Write out the gated delta rule of a trace: products over all chunks at once, and a Scan that carries the state through them.

The number of chunks depends on the length, which a trace cannot follow. For CPUs a second branch takes one token: a decode step
would otherwise compute a whole chunk, CHUNK times the products.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeprune.export.passes.replacement import replace_nodes
from edgeprune.families.recurrent import CHUNK, DOMAIN, OPERATOR, block_masks


def expand_delta_rules(graph: ir.Graph, *, single: bool) -> None:
    """Replace every GatedDeltaRule node by standard ONNX operators. `single`: with a branch for one token."""
    constants = _Constants(graph)
    for node in list(graph):
        if (node.domain, node.op_type) != (DOMAIN, OPERATOR):
            continue
        rule = _Rule(node, constants)
        results = rule.either() if single else rule.in_chunks()
        replace_nodes(graph, node, [node], rule.tape, dict(zip(node.outputs, results, strict=True)))


class _Constants:
    # Initializers that all rules of a graph share.
    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._known = graph, dict[str, ir.Value]()

    def integers(self, *numbers: int) -> ir.Value:
        return self.array("_".join(map(str, numbers)).replace("-", "m"), np.array(numbers, np.int64))

    def array(self, name: str, array: np.ndarray) -> ir.Value:
        name = f"delta_{name}"
        if name not in self._known:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
            self._graph.register_initializer(value)
            self._known[name] = value
        return self._known[name]


class _Rule:
    # Writes one rule onto `tape`. Value names carry the node's name, because those of the outer graph are visible in subgraphs.
    def __init__(self, node: ir.Node, constants: _Constants) -> None:
        self.tape, self._name, self._constants = Tape(), str(node.name), constants
        packed, state = node.inputs
        assert packed is not None and state is not None and state.shape is not None
        self._packed, self._state, self._outputs = packed, state, node.outputs
        self._heads, self._keys, self._values = (int(str(size)) for size in state.shape)
        self._written = 0

    def either(self) -> list[ir.Value]:
        """Return the outputs for one token or for more."""
        outer, branches = self.tape, dict[str, ir.Graph]()
        for branch, results in (("then_branch", self._one_token), ("else_branch", self.in_chunks)):
            self.tape = Tape()
            values = results()
            for value, like in zip(values, self._outputs, strict=True):
                value.type, value.shape = like.type, like.shape
            branches[branch] = ir.Graph([], values, nodes=list(self.tape.nodes), name=f"{self._name}_{branch}")
        self.tape = outer
        alone = self._op("Less", self._length(), self._constants.integers(2))
        return list(self._op_multi("If", 2, alone, **branches))

    def in_chunks(self) -> list[ir.Value]:
        """Return the outputs for any number of tokens; see `families/recurrent.py`."""
        query, key, value, decay, beta = self._chunks()
        faded = self._op("MatMul", self._array("lower", np.tril(np.ones((CHUNK, CHUNK)))), decay)
        between = self._op("Sub", faded, self._transposed(faded))
        below = self._constants.array("below", np.tril(np.ones((CHUNK, CHUNK), bool)))
        between = self._op("Exp", self._op("Where", below, between, self._array("never", np.array(-np.inf))))
        changes = self._op("Mul", self._op("MatMul", self._op("Mul", beta, key), self._transposed(key)), between)
        inverse = self._inverse(changes)
        grown = self._op("Exp", faded)
        new_values = self._op("MatMul", inverse, self._op("Mul", beta, value))
        read_keys = self._op("MatMul", inverse, self._op("Mul", self._op("Mul", beta, key), grown))
        within = self._op("Mul", self._op("MatMul", query, self._transposed(key)), between)
        last = self._slice(faded, CHUNK - 1, CHUNK, axis=2)
        keys = self._transposed(self._op("Mul", key, self._op("Exp", self._op("Sub", last, faded))))
        scanned = (new_values, read_keys, self._op("Mul", query, grown), within, keys, self._op("Exp", last))
        state, chunks = self._op_multi("Scan", 2, self._state, *scanned, body=self._body(), num_scan_inputs=len(scanned))
        rows = self._op("Reshape", self._transposed(chunks, 0, 2, 1, 3), self._constants.integers(-1, self._heads, self._values))
        return [self._op("Slice", rows, self._constants.integers(0), self._length(), self._constants.integers(0)), state]

    def _one_token(self) -> list[ir.Value]:
        # [heads, 1, width], so that the state's products are products of matrices.
        token = self._transposed(self._packed, 1, 0, 2)
        query, key, value, decay, beta = self._split(token, axis=2)
        state = self._op("Mul", self._state, self._op("Exp", decay))
        change = self._op("Mul", beta, self._op("Sub", value, self._op("MatMul", key, state)))
        state = self._op("Add", state, self._op("Mul", self._transposed(key, 0, 2, 1), change))
        return [self._transposed(self._op("MatMul", query, state), 1, 0, 2), state]

    def _chunks(self) -> Sequence[ir.Value]:
        # Query, key, value, decay and beta [chunks, heads, CHUNK, width], with tokens of zeros at the end.
        width, one = 2 * self._keys + self._values + 2, self._constants.integers
        zeros = self._array(f"zeros_{self._heads}_{width}", np.zeros((CHUNK - 1, self._heads, width)))
        count = self._op("Div", self._op("Add", self._length(), one(CHUNK - 1)), one(CHUNK))
        longer = self._op("Concat", self._packed, zeros, axis=0)
        whole = self._op("Slice", longer, one(0), self._op("Mul", count, one(CHUNK)), one(0))
        chunks = self._op("Reshape", whole, one(-1, CHUNK, self._heads, width))
        return self._split(self._transposed(chunks, 0, 2, 1, 3), axis=3)

    def _inverse(self, changes: ir.Value) -> ir.Value:
        # The first step begins with the identity.
        first, *others = (self._array(f"mask_{number}", mask.numpy()) for number, mask in enumerate(block_masks()))
        inverse = self._op("Sub", self._array("identity", np.eye(CHUNK)), self._op("Mul", changes, first))
        for mask in others:
            joined = self._op("MatMul", self._op("MatMul", inverse, self._op("Mul", changes, mask)), inverse)
            inverse = self._op("Sub", inverse, joined)
        return inverse

    def _body(self) -> ir.Graph:
        # One chunk: the state before it, and the scanned values of `in_chunks`.
        heads, keys, values = self._heads, self._keys, self._values
        shapes = [
            (keys, values),
            (CHUNK, values),
            (CHUNK, keys),
            (CHUNK, keys),
            (CHUNK, CHUNK),
            (keys, CHUNK),
            (1, 1),
        ]
        inputs = [
            ir.Value(name=f"{self._name}_chunk_{number}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((heads, *shape)))
            for number, shape in enumerate(shapes)
        ]
        state, new_values, read_keys, query, within, key, fade = inputs
        outer, self.tape = self.tape, Tape()
        written = self._op("Sub", new_values, self._op("MatMul", read_keys, state))
        output = self._op("Add", self._op("MatMul", query, state), self._op("MatMul", within, written))
        after = self._op("Add", self._op("Mul", state, fade), self._op("MatMul", key, written))
        for value, shape in ((after, (keys, values)), (output, (CHUNK, values))):
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape((heads, *shape))
        body = ir.Graph(inputs, [after, output], nodes=list(self.tape.nodes), name=f"{self._name}_chunk")
        self.tape = outer
        return body

    def _split(self, packed: ir.Value, axis: int) -> Sequence[ir.Value]:
        sizes = self._constants.integers(self._keys, self._keys, self._values, 1, 1)
        return self._op_multi("Split", 5, packed, sizes, axis=axis)

    def _length(self) -> ir.Value:
        return self._op("Shape", self._packed, start=0, end=1)

    def _transposed(self, value: ir.Value, *order: int) -> ir.Value:
        return self._op("Transpose", value, perm=order or (0, 1, 3, 2))

    def _slice(self, value: ir.Value, start: int, end: int, axis: int) -> ir.Value:
        integers = self._constants.integers
        return self._op("Slice", value, integers(start), integers(end), integers(axis))

    def _array(self, name: str, array: np.ndarray) -> ir.Value:
        return self._constants.array(name, array.astype(np.float32))

    def _op(self, kind: str, *inputs: ir.Value, **attributes: int | Sequence[int] | ir.Graph) -> ir.Value:
        (value,) = self._op_multi(kind, 1, *inputs, **attributes)
        return value

    def _op_multi(
        self, kind: str, outputs: int, *inputs: ir.Value, **attributes: int | Sequence[int] | ir.Graph
    ) -> Sequence[ir.Value]:
        name = f"{self._name}_{self._written}"
        self._written += 1
        values = [ir.Value(name=f"{name}_{output}") for output in range(outputs)]
        self.tape.op_multi_out(kind, inputs, attributes, outputs=values, name=name)
        return values
