"""Speed up torch's ONNX exporter by skipping work that our graphs do not need, which takes most of the export time.

Six parts of torch 2.13 are patched while a graph is traced (measured with `py-spy` on the decoder of a tiny model):

- The fake tensor cache is disabled. With symbolic lengths, creating and reading an entry takes longer than the operator itself.
- No node gets the stack of its call: the pass pipeline would remove it.
- The decomposition. The exporter runs the whole program through AOT autograd to replace operators that ONNX lacks. In our graphs
  these are casts and assertions, which are replaced in place here. Programs with other such operators take the exporter's own path.
- The type promotion. The pass runs every node again on fake tensors to learn its type, which the trace has recorded already.
- The scopes of `torch.no_grad`, as in transformers' rotary embeddings, are erased instead of being split into subgraphs.
- The registry of ONNX functions is built once instead of for every graph.

The last four are private to torch, which is pinned to one minor version; `tests/export/test_torch_exporter.py` compares the
results.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._export.passes import replace_set_grad_with_hop_pass
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx import config as fx_config
from torch.onnx._internal.exporter import _decomp, _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes import type_promotion

_aten = torch.ops.aten
_CASTS = (_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout)
_ASSERTIONS = (_aten._assert_scalar.default, _aten._assert_tensor_metadata.default)
_ONNX = ("onnx", "onnx_symbolic")  # operators that are written as they are
_DECOMPOSED_HERE = {*_CASTS, *_ASSERTIONS, _aten.rsub.Scalar}
_Promotion = type_promotion._TypePromotionInterpreter
_run_node = _Promotion.run_node
_decompose = _fx_passes.decompose_with_registry
_from_torchlib = functools.cache(ONNXRegistry.from_torchlib)


@contextmanager
def quick_exporter() -> Iterator[None]:
    """Speed up `torch.onnx.export` inside the block and silence its warnings. Not thread-safe: the patches are global."""
    logger = logging.getLogger("torch.onnx")  # warns on every run that torchvision is missing
    level = logger.level
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._dynamo.config.patch(fake_tensor_cache_enabled=False))
        stack.enter_context(mock.patch.object(fx_config, "do_not_emit_stack_traces", True))
        stack.enter_context(mock.patch.object(_fx_passes, "decompose_with_registry", _fast_decompose))
        stack.enter_context(mock.patch.object(_Promotion, "run_node", _promote_types))
        stack.enter_context(mock.patch.object(replace_set_grad_with_hop_pass, "replace_set_grad_with_hop_pass", _erase_grad_modes))
        stack.enter_context(mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(_from_torchlib)))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        stack.callback(logger.setLevel, level)
        yield


def _erase_grad_modes(module: GraphModule, signature: Any) -> tuple[GraphModule, Any]:
    # Replaces `replace_set_grad_with_hop_pass`.
    for node in list(module.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            module.graph.erase_node(node)
    module.recompile()
    return module, signature


def _fast_decompose(program: ExportedProgram, registry: ONNXRegistry) -> ExportedProgram:
    # Replaces `decompose_with_registry`: returns the program without operators that ONNX lacks.
    known = set(_decomp.get_onnx_implemented_overloads(registry))
    graph: Graph = program.graph
    if not all(_is_simple(node, known) for node in graph.nodes):
        return _decompose(program, registry)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
        elif node.target in _CASTS:
            source, kind = node.args[0], node.meta["val"].dtype
            named = source.op == "placeholder" or _is_output(source)  # graph inputs and outputs must stay distinct values
            if source.meta["val"].dtype == kind and not (named and _is_output(node)):
                _replace(program, node, source)
            else:
                _replace_by_call(program, node, _aten._to_copy.default, (source,), {"dtype": kind})
        elif node.target is _aten.rsub.Scalar:
            _replace_by_call(program, node, _aten.sub.Tensor, (node.args[1], node.args[0]), {})
    program.graph_module.recompile()
    return program


def _promote_types(interpreter: Any, node: Node) -> Any:
    # Replaces `run_node`: casts arguments where a rule asks for it, and returns the recorded value instead of running the node.
    if node.op != "call_function" or "val" not in node.meta:
        return _run_node(interpreter, node)
    rule = type_promotion.get_type_promotion_rule(node, interpreter.type_promotion_table)
    if rule is not None:
        with interpreter._set_current_node(node):
            interpreter._maybe_promote_node(node, rule)
    return node.meta["val"]


def _is_simple(node: Node, known: set[Any]) -> bool:
    # Whether a node needs no decomposition except those done here. In-place operators are excluded: they need functionalization.
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return not isinstance(target, torch._ops.HigherOrderOperator)
    if target is _aten.rsub.Scalar and len(node.args) > 2:
        return False
    return (target in known or target in _DECOMPOSED_HERE or target.namespace in _ONNX) and not target._schema.is_mutable


def _is_output(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _replace_by_call(program: ExportedProgram, node: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with program.graph.inserting_before(node):
        call = program.graph.call_function(target, args, kwargs)
    call.meta = dict(node.meta)
    _replace(program, node, call)


def _replace(program: ExportedProgram, node: Node, value: Node) -> None:
    # The signature refers to outputs by name.
    program.graph_signature.replace_all_uses(node.name, value.name)
    node.replace_all_uses_with(value)
    program.graph.erase_node(node)
