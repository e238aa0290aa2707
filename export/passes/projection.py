"""What lies between the projections of a decoder's layer and its attention: the rotation and the new rows of the cache.

GroupQueryAttention rotates queries and keys itself and writes the new row into its buffers, so a step of one token needs neither.
They move into the branch of attention for several rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgeprune.export.passes.fusion import RESHAPES, before_reshapes

_HEAD_STEP, _HALF_STEP = 16, 8  # GroupQueryAttention rotates heads, and halves of what it rotates, of multiples of these


@dataclass(frozen=True)
class Projection:
    """Queries, keys and values before rotation [S, 1, width], for GroupQueryAttention.

    `operands`: one product with all three, and twice None; or the three. `angles`: cosines and sines [S, 1, half of what is rotated
    of a head]. `nodes`: what follows the operands, in graph order; nothing else reads it. `added`: the outputs of the graph among
    their results.
    """

    operands: tuple[ir.Value | None, ir.Value | None, ir.Value | None]
    angles: tuple[ir.Value, ir.Value]
    nodes: tuple[ir.Node, ...]
    added: tuple[ir.Value, ...]

    @classmethod
    def of(cls, graph: ir.Graph, rows: ir.Value, key: ir.Value, value: ir.Value, readers: Sequence[ir.Node]) -> Projection | None:
        """Return the projection behind an attention, None if its rotation has another form or is read elsewhere.

        `rows`: the rotated queries; `key` and `value` [S, kv heads, head_dim]; `readers`: what turns queries, and attention.
        """
        turns = [before_reshapes(rotated).producer() for rotated in (rows, key)]
        query_turn, key_turn = turns
        if query_turn is None or key_turn is None or not _fits(query_turn, key_turn, key):
            return None
        if any(reader not in readers for node in readers[:-1] for output in node.outputs for reader in output.consumers()):
            return None
        _, cos, sin = key_turn.inputs
        assert cos is not None and sin is not None
        states = query_turn.inputs[0], key_turn.inputs[0], before_reshapes(value)
        first: list[ir.Node] = [query_turn, key_turn, *_reshapes_of(value)]
        joined = _joined(states)
        operands = states if joined is None else (joined.inputs[0], None, None)
        nodes = _followers(first if joined is None else [joined], readers)
        if nodes is None:
            return None
        added = tuple(output for output in graph.outputs if output.producer() in nodes)
        return cls(operands, (cos, sin), tuple(node for node in graph if node in nodes), added)


def _fits(query_turn: ir.Node, key_turn: ir.Node, key: ir.Value) -> bool:
    # Whether GroupQueryAttention can do what both nodes do, each token a sequence of its own.
    if {query_turn.op_type, key_turn.op_type} != {"RotaryEmbedding"} or query_turn.inputs[1:] != key_turn.inputs[1:]:
        return False
    if len(key_turn.inputs) != 3 or any({*node.attributes} - {"num_heads"} for node in (query_turn, key_turn)):
        return False
    cos, width = key_turn.inputs[1], key.shape[2] if key.shape is not None else None
    if cos is None or cos.shape is None or len(cos.shape) != 3 or cos.shape[1] != 1 or not isinstance(width, int):
        return False
    half = cos.shape[2]
    return isinstance(half, int) and width % _HEAD_STEP == 0 and half % _HALF_STEP == 0 and 2 * half <= width


def _joined(states: Sequence[ir.Value | None]) -> ir.Node | None:
    # The Split [S, 1, width] that these are all parts of, in this order.
    roots = [before_reshapes(state) for state in states if state is not None]
    split = roots[0].producer()
    if split is None or split.op_type != "Split" or list(split.outputs) != roots:
        return None
    shape = split.inputs[0].shape if split.inputs[0] is not None else None
    return split if shape is not None and len(shape) == 3 and shape[1] == 1 else None


def _reshapes_of(value: ir.Value) -> list[ir.Node]:
    producer = value.producer()
    if producer is None or producer.op_type not in RESHAPES or producer.inputs[0] is None:
        return []
    return [*_reshapes_of(producer.inputs[0]), producer]


def _followers(first: Sequence[ir.Node], readers: Sequence[ir.Node]) -> set[ir.Node] | None:
    # All nodes behind the first up to the readers; None if there are others than rotations and reshapes.
    found, waiting = set[ir.Node](), list(first)
    while waiting:
        node = waiting.pop()
        if node in found or node in readers:
            continue
        if node not in first and node.op_type not in (*RESHAPES, "RotaryEmbedding"):
            return None
        found.add(node)
        waiting += [reader for output in node.outputs for reader in output.consumers()]
    return found
