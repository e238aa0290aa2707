"""The optimization of traced graphs: onnxscript's own, without the one rule whose cost grows with the square of the graph.

That rule makes Split of two Slices; it compares every node with all others, which is half the time of a 24-layer decoder.
"""

from __future__ import annotations

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
from onnxscript.optimizer._constant_folding import FoldConstantsPass
from onnxscript.rewriter import _DEFAULT_REWRITE_RULES, RewritePass
from onnxscript.rewriter.onnx_fusions import fuse
from onnxscript.rewriter.rules.common._basic_rules import slice_split_rule

_RULES = tuple(rule for rule in _DEFAULT_REWRITE_RULES if rule is not slice_split_rule)
_LARGEST_INPUT, _LARGEST_OUTPUT = 8192, 512 * 512  # elements of what is computed beforehand


def optimize(model: ir.Model) -> None:
    """Fold constants, rewrite, and remove what is unused or there twice."""
    folding = FoldConstantsPass(shape_inference=True, input_size_limit=_LARGEST_INPUT, output_size_limit=_LARGEST_OUTPUT)
    functions = RemoveUnusedFunctionsPass()  # type: ignore[no-untyped-call]
    Sequential(
        InlinePass(),
        PassManager(
            [folding, RewritePass(_RULES), RemoveUnusedNodesPass(), functions, RemoveUnusedOpsetsPass()], steps=2, early_stop=True
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
