"""Fusions: onnxscript's optimizer, one product for query, key and value, the RotaryEmbedding operator of opset 23, and no
reshape after another.

The optimizer runs without its rule that fuses two Slices into a Split: it compares every node with all others, which takes half
the time of a 24-layer decoder. Its other rules see only nodes of the operator that their pattern ends with. One product instead of
three starts a CPU's threads once. RotaryEmbedding makes two passes over the states instead of six.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassManager, Sequential
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    NameFixPass,
    OutputFixPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from onnx_ir.tape import Tape
from onnxscript.optimizer._constant_folding import FoldConstantsPass
from onnxscript.rewriter import _DEFAULT_REWRITE_RULES, RewritePass, RewriteRule
from onnxscript.rewriter.onnx_fusions import fuse
from onnxscript.rewriter.rules.common._basic_rules import slice_split_rule

from edgeprune.checkpoint.packed import PackedMatrix
from edgeprune.export.passes.replacement import replace_nodes
from edgeprune.export.passes.weights import LazyInitializer, StackedMatrix, matrix_of

_MAX_INPUT, _MAX_OUTPUT = 8192, 512 * 512  # elements; size limits of constant folding
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
RESHAPES = ("Reshape", "Unsqueeze", "Squeeze")


def optimize(model: ir.Model) -> None:
    """Fold constants, apply rewrite rules, and remove unused and duplicate nodes."""
    folding = FoldConstantsPass(shape_inference=True, input_size_limit=_MAX_INPUT, output_size_limit=_MAX_OUTPUT)
    functions = RemoveUnusedFunctionsPass()  # type: ignore[no-untyped-call]
    rules = _RuleTable(rule for rule in _DEFAULT_REWRITE_RULES if rule is not slice_split_rule)
    Sequential(
        InlinePass(),
        PassManager(
            [folding, RewritePass([rules]), RemoveUnusedNodesPass(), functions, RemoveUnusedOpsetsPass()], steps=2, early_stop=True
        ),
        RemoveUnusedNodesPass(),
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        LiftSubgraphInitializersToMainGraphPass(),
        DeduplicateInitializersPass(),
        CommonSubexpressionEliminationPass(),
        OutputFixPass(),
        NameFixPass(),
    )(model)
    fuse(model)


class _RuleTable:
    # One rule to the rewriter: of all rules, those that end with the operator of the node at hand. Asking every rule about every
    # node takes twice as long. What the rewriter wants to know of a rule, it asks after a match.
    def __init__(self, rules: Iterable[RewriteRule]) -> None:
        self._rules = list(rules)
        self._ending = functools.cache(self._ending_with)
        self.remove_nodes = all(rule.remove_nodes for rule in self._rules)
        self.as_function, self.name = False, ""

    def _ending_with(self, operator: ir.OperatorIdentifier) -> list[RewriteRule]:
        # A pattern may leave its last operator open.
        ends = [(rule, rule._target_pattern.output_nodes[0].op_identifier()) for rule in self._rules]
        return [rule for rule, end in ends if end in (None, operator)]

    def try_rewrite(self, model: ir.Model, graph: ir.Graph | ir.Function, node: ir.Node, **options: Any) -> Any:
        for rule in self._ending(node.op_identifier()):
            replacement = rule.try_rewrite(model, graph, node, **options)
            if replacement is not None:
                self.remove_nodes, self.as_function, self.name = rule.remove_nodes, rule.as_function, rule.name
                return replacement
        return None

    def graph_pre_visitor(self) -> None:
        for rule in self._rules:
            if rule.graph_pre_visitor is not None:
                rule.graph_pre_visitor()

    def graph_post_visitor(self) -> None:
        for rule in self._rules:
            if rule.graph_post_visitor is not None:
                rule.graph_post_visitor()


def fuse_rotation(graph: ir.Graph) -> None:
    """Replace x * cos + concat(-second half, first half) * sin by RotaryEmbedding, for x [heads, patches, head_dim]."""
    halves: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type == "Concat" and (match := _match_rotation(node)) is not None:
            _replace_rotation(graph, *match, halves)


def _match_rotation(concat: ir.Node) -> tuple[ir.Node, ir.Value, ir.Value, ir.Value] | None:
    # Returns the last node, x, and the cosine and sine tables.
    negated, first = concat.inputs[0], concat.inputs[1]
    negation = negated.producer() if negated is not None else None
    if len(concat.inputs) != 2 or first is None or negation is None or negation.op_type != "Neg":
        return None
    x, sin_product = _source_of_halves(first, negation.inputs[0]), _only_consumer(concat.outputs[0], "Mul")
    add = _only_consumer(sin_product.outputs[0], "Add") if sin_product is not None else None
    if x is None or sin_product is None or add is None:
        return None
    cos_product = next((v.producer() for v in add.inputs if v is not None and v is not sin_product.outputs[0]), None)
    if cos_product is None or cos_product.op_type != "Mul" or x not in cos_product.inputs:
        return None
    cos, sin = _other_input(cos_product, x), _other_input(sin_product, concat.outputs[0])
    return (add, x, cos, sin) if cos is not None and sin is not None else None


def _source_of_halves(first: ir.Value, second: ir.Value | None) -> ir.Value | None:
    # The value [heads, patches, head_dim] of which both are the halves, if any.
    nodes = [half.producer() if half is not None else None for half in (first, second)]
    if nodes[0] is None or nodes[1] is None or {node.op_type for node in nodes if node is not None} != {"Slice"}:
        return None
    x, starts = nodes[0].inputs[0], [_number(node.inputs[1]) for node in nodes if node is not None]
    if x is None or x is not nodes[1].inputs[0] or x.shape is None or len(x.shape) != 3:
        return None
    return x if starts == [0, int(str(x.shape[2])) // 2] else None


def _number(value: ir.Value | None) -> int | None:
    return None if value is None or value.const_value is None else int(value.const_value.numpy()[0])


def _only_consumer(value: ir.Value, kind: str) -> ir.Node | None:
    consumers = value.consumers()
    return consumers[0] if len(consumers) == 1 and consumers[0].op_type == kind else None


def _other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    return next((other for other in node.inputs if other is not value), None)


def _replace_rotation(
    graph: ir.Graph, add: ir.Node, x: ir.Value, cos: ir.Value, sin: ir.Value, halves: dict[ir.Value, ir.Value]
) -> None:
    assert x.shape is not None
    patches, width = (int(str(size)) for size in list(x.shape)[1:])
    tape, output = Tape(), add.outputs[0]

    def constant(name: str, *numbers: int) -> ir.Value:
        return tape.initializer(ir.tensor(np.array(numbers, np.int64), name=f"{add.name}.{name}"))

    for name, table in (("cos", cos), ("sin", sin)):
        if table not in halves:  # the operator takes the angles of one half; the other half has the same angles
            rows = tape.op("Reshape", [table, constant(f"{name}_shape", 1, patches, width)])
            ends = [constant(f"{name}_{end}", number) for end, number in (("start", 0), ("end", width // 2), ("axis", 2))]
            halves[table] = tape.op("Slice", [rows, *ends])
    batch = constant("batch", 0)
    rotated = tape.op("RotaryEmbedding", [tape.op("Unsqueeze", [x, batch]), halves[cos], halves[sin]])
    # Tables with a batch axis give the traced product a batch axis too.
    value = tape.op("Squeeze", [rotated, batch]) if output.shape is not None and len(output.shape) == 3 else rotated
    replace_nodes(graph, add, [add], tape, {output: value})


def fuse_qkv(graph: ir.Graph) -> None:
    """Replace a layer's three Gemm nodes for query, key and value of one state by one Gemm and a Split.

    Layers that are quantized in the checkpoint stay three, each with its own integers.
    """
    groups: dict[tuple[ir.Value, str], dict[str, ir.Node]] = {}
    for node in graph:
        if node.op_type == "Gemm" and (name := str(node.inputs[1].name if node.inputs[1] else "")).endswith(".weight"):
            layer, _, part = name.removesuffix(".weight").rpartition(".")
            assert node.inputs[0] is not None
            groups.setdefault((node.inputs[0], layer), {})[part] = node
    for (state, layer), nodes in groups.items():
        quantized = any(isinstance(matrix_of(node.inputs[1]), PackedMatrix) for node in nodes.values() if node.inputs[1])
        if set(PROJECTIONS) <= set(nodes) and not quantized:
            _join_gemms(graph, state, layer, [nodes[name] for name in PROJECTIONS])


def _join_gemms(graph: ir.Graph, state: ir.Value, layer: str, nodes: Sequence[ir.Node]) -> None:
    weights, biases = zip(*((node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None) for node in nodes), strict=True)
    matrices = tuple(matrix_of(weight) for weight in weights)
    sizes = [matrix.shape[0] for matrix in matrices]
    tape = Tape()
    inputs = [state, tape.initializer(LazyInitializer(StackedMatrix(matrices), f"{layer}.qkv_proj.weight"))]
    if any(biases):
        rows = [np.zeros(size, np.float32) if bias is None else _numbers(bias) for bias, size in zip(biases, sizes, strict=True)]
        inputs.append(tape.initializer(ir.tensor(np.concatenate(rows), name=f"{layer}.qkv_proj.bias")))
    split = tape.initializer(ir.tensor(np.array(sizes, np.int64), name=f"{layer}.qkv_proj.sizes"))
    joined = tape.op("Gemm", inputs, {"transB": 1})
    joined.type, joined.shape = nodes[0].outputs[0].type, ir.Shape([_rows(nodes[0]), sum(sizes)])
    # RotaryEmbedding takes [1, S, width] or [S, 1, width]: one Reshape in front of the Split is cheaper than one for each part.
    rotated = [_rotated(node.outputs[0]) for node in nodes[:2]]
    ahead = None if None in rotated else rotated[0]
    if ahead is not None:
        leading = [1, -1] if ahead.shape is not None and ahead.shape[0] == 1 else [-1, 1]
        shape = tape.initializer(ir.tensor(np.array([*leading, sum(sizes)], np.int64), name=f"{layer}.qkv_proj.shape"))
        sequences = tape.op("Reshape", [joined, shape])
        sequences.type, sequences.shape = (
            joined.type,
            ir.Shape([size if size > 0 else _rows(nodes[0]) for size in leading] + [sum(sizes)]),
        )
        joined = sequences
    parts = tape.op_multi_out("Split", [joined, split], {"axis": 1 if ahead is None else 2}, num_outputs=len(nodes))
    if ahead is not None:
        parts = [_reshaped(tape, part, node.outputs[0], leading[0]) for part, node in zip(parts, nodes, strict=True)]
    values = {node.outputs[0]: part for node, part in zip(nodes, parts, strict=True)}
    replace_nodes(graph, min(nodes, key=list(graph).index), nodes, tape, values)


def _rows(node: ir.Node) -> Any:
    shape = node.outputs[0].shape
    assert shape is not None
    return shape[0]


def _rotated(value: ir.Value) -> ir.Value | None:
    # What a RotaryEmbedding makes of a value, if nothing else happens to it.
    consumers = value.consumers()
    if len(consumers) != 1:
        return None
    output = consumers[0].outputs[0]
    return output if consumers[0].op_type == "RotaryEmbedding" else _rotated(output) if consumers[0].op_type in RESHAPES else None


def _reshaped(tape: Tape, part: ir.Value, like: ir.Value, sequences: int) -> ir.Value:
    # A part of a product, [1, S, width] if there is one sequence and else [S, 1, width], as the traced value `like` [S, width].
    assert like.shape is not None and like.name is not None
    rows, width = like.shape
    part.type, part.shape = like.type, ir.Shape([1, rows, width] if sequences == 1 else [rows, 1, width])
    shape = tape.initializer(ir.tensor(np.array([-1, like.shape[1]], np.int64), name=f"{like.name}.shape"))
    return tape.op("Reshape", [part, shape])


def _numbers(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    numbers: np.ndarray = value.const_value.numpy()
    return numbers


def merge_reshapes(graph: ir.Graph) -> None:
    """Replace chains of Reshape, Unsqueeze and Squeeze by one Reshape, or by nothing if the first shape is the last."""
    shapes: dict[tuple[int, ...], ir.Value] = {}
    for node in list(graph):
        if node.op_type not in RESHAPES or node.outputs[0].shape is None:
            continue
        output, root = node.outputs[0], before_reshapes(node.outputs[0])
        sizes = tuple(size if isinstance(size, int) else -1 for size in output.shape or ())
        if root.shape is not None and list(root.shape) == list(output.shape or ()) and not output.is_graph_output():
            ir.convenience.replace_all_uses_with(output, root)
        elif root is not node.inputs[0] and sizes.count(-1) < 2 and 0 not in sizes:
            tape = Tape()
            if sizes not in shapes:
                name = "shape_" + "_".join(map(str, sizes)).replace("-", "m")
                shapes[sizes] = tape.initializer(ir.tensor(np.array(sizes, np.int64), name=name))
            replace_nodes(graph, node, [node], tape, {output: tape.op("Reshape", [root, shapes[sizes]])})


def before_reshapes(value: ir.Value) -> ir.Value:
    """Return the value that reshapes made into this one, which is itself if none did."""
    producer = value.producer()
    if producer is None or producer.op_type not in RESHAPES:
        return value
    assert producer.inputs[0] is not None
    return before_reshapes(producer.inputs[0])


def fuse_sums(graph: ir.Graph) -> None:
    """Replace a sum and the RMSNormalization behind it by ONNX Runtime's SkipSimplifiedLayerNormalization, which gives both."""
    for node in list(graph):
        total = node.inputs[0] if node.op_type == "RMSNormalization" else None
        add, scale = total.producer() if total is not None else None, node.inputs[-1]
        if (
            add is None
            or total is None
            or add.op_type != "Add"
            or scale is None
            or not _sums_rows(add)
            or scale.const_value is None
        ):
            continue
        outputs = [ir.Value(), *(ir.Value(name="") for _ in range(2)), ir.Value()]  # no mean, no deviation
        tape, epsilon = Tape(), node.attributes.get_float("epsilon", 1e-5)
        inputs, settings = [*add.inputs, scale], {"epsilon": epsilon}
        tape.op_multi_out("SkipSimplifiedLayerNormalization", inputs, settings, domain=MICROSOFT, outputs=outputs)
        replace_nodes(graph, add, [add, node], tape, {node.outputs[0]: outputs[0], total: outputs[3]})
        graph.opset_imports[MICROSOFT] = 1


def _sums_rows(add: ir.Node) -> bool:
    shapes = [list(value.shape or ()) if value is not None else [] for value in add.inputs]
    return len(shapes[0]) == 2 and shapes[0] == shapes[1]


def divide_norms(graph: ir.Graph) -> None:
    """Replace x * Reciprocal(Sqrt(y)) by x / Sqrt(y), the form in which ONNX Runtime recognizes a decomposed norm."""
    for node in list(graph):
        if node.op_type != "Reciprocal" or (product := _only_consumer(node.outputs[0], "Mul")) is None:
            continue
        root, state = node.inputs[0], _other_input(product, node.outputs[0])
        if root is not None and state is not None and (source := root.producer()) is not None and source.op_type == "Sqrt":
            tape = Tape()
            replace_nodes(graph, product, [product, node], tape, {product.outputs[0]: tape.op("Div", [state, root])})
