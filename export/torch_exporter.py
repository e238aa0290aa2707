"""torch's ONNX exporter, without the work that these graphs do not need: it is most of the time that an export takes.

Three things of torch 2.13 are changed while a graph is traced (`py-spy` on the decoder of a tiny model):

- The cache of fake tensors. With symbolic lengths, making and reading an entry takes longer than the operator itself.
- The decomposition. The exporter runs the whole program through AOT autograd to replace operators that ONNX lacks. In these graphs
  such operators are casts and assertions, which are replaced in place here. Whatever else is found takes the exporter's own way.
- The registry of ONNX functions, which the exporter builds anew for every graph.

The last two are private to torch, which is pinned to one minor version; `tests/export/test_torch_exporter.py` compares the results.
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
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.onnx._internal.exporter import _decomp, _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

_aten = torch.ops.aten
_CASTS = (_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout)
_ASSERTIONS = (_aten._assert_scalar.default, _aten._assert_tensor_metadata.default)
_ONNX = ("onnx", "onnx_symbolic")  # operators that are written as they are
_REPLACED = {*_CASTS, *_ASSERTIONS, _aten.rsub.Scalar}
_decompose = _fx_passes.decompose_with_registry
_from_torchlib = functools.cache(ONNXRegistry.from_torchlib)


@contextmanager
def quick_exporter() -> Iterator[None]:
    """Let `torch.onnx.export` run without gradients, warnings and needless work inside the block. For one thread at a time."""
    logger = logging.getLogger("torch.onnx")  # it notes on every run that torchvision is absent
    level = logger.level
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._dynamo.config.patch(fake_tensor_cache_enabled=False))
        stack.enter_context(mock.patch.object(_fx_passes, "decompose_with_registry", _replaced))
        stack.enter_context(mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(_from_torchlib)))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        stack.callback(logger.setLevel, level)
        yield


def _replaced(program: ExportedProgram, registry: ONNXRegistry) -> ExportedProgram:
    # Instead of `decompose_with_registry`: the same program without operators that ONNX lacks.
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
            named = source.op == "placeholder" or _is_output(source)  # two outputs, or an input and an output, stay two values
            if source.meta["val"].dtype == kind and not (named and _is_output(node)):
                _put(program, node, source)
            else:
                _put_call(program, node, _aten._to_copy.default, (source,), {"dtype": kind})
        elif node.target is _aten.rsub.Scalar:
            _put_call(program, node, _aten.sub.Tensor, (node.args[1], node.args[0]), {})
    program.graph_module.recompile()
    return program


def _is_simple(node: Node, known: set[Any]) -> bool:
    # Whether a node needs no decomposition but those that are done here. Nothing may write to its inputs: that is not undone here.
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return not isinstance(target, torch._ops.HigherOrderOperator)
    if target is _aten.rsub.Scalar and len(node.args) > 2:
        return False
    return (target in known or target in _REPLACED or target.namespace in _ONNX) and not target._schema.is_mutable


def _is_output(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _put_call(program: ExportedProgram, node: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with program.graph.inserting_before(node):
        made = program.graph.call_function(target, args, kwargs)
    made.meta = dict(node.meta)
    _put(program, node, made)


def _put(program: ExportedProgram, node: Node, value: Node) -> None:
    # The signature names the outputs.
    program.graph_signature.replace_all_uses(node.name, value.name)
    node.replace_all_uses_with(value)
    program.graph.erase_node(node)
