"""Traces kept on disk: a graph that was traced before, in this run or an earlier one, is read instead.

The exporter's graph (`edgeprune.export.tracing.traced`) is a function of the traced module, its example arguments, the opset and
the code that runs, so the key is a digest of all of them. Of the module everything that it holds counts, as `pickle` would find it:
plans, methods and their numbers, sizes. Only parameters and buffers count by name, shape and type alone: they are inputs of a trace
and not part of it, and a graph that is read gets those of the module at hand. What has parts of unknown sources, such as a class of
some test, is traced anew.

Workers share the folder; who comes second to a trace waits for the first. EDGEPRUNE_TRACE_CACHE names another folder than
build/traces; "off" traces everything.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import onnx
import onnx_ir as ir
import torch
from filelock import FileLock
from onnx_ir.tensor_adapters import TorchTensor
from repository import ROOT
from torch import nn
from transformers import PreTrainedConfig

from edgeprune.export import tracing

FOLDER = ROOT / "build" / "traces"
OFF = "off"
_FOUND_BY_NAME = ("edgeprune.families", "edgeprune.methods")  # the registry imports what is in them when it is asked for
_PACKAGES = ("torch", "onnxscript", "onnx_ir", "onnx", "transformers", "sympy")
_KNOWN = {"edgeprune", "numpy", *_PACKAGES, *sys.stdlib_module_names}  # whose classes a key knows by their names
_COUNTERS = ("_value_counter", "_node_counter")  # of the names that the passes give to what they add
Traced = Callable[[Any, int], ir.Model]
FRESH = tracing.traced  # for tests that break the code on purpose, which the key of a trace cannot know


class Unknown(Exception):
    """A module holds something that a key cannot stand for."""


def folder() -> Path | None:
    """Return where traces are kept, None where they are not to be."""
    named = os.environ.get("EDGEPRUNE_TRACE_CACHE", "")
    return None if named == OFF else Path(named) if named else FOLDER


@contextmanager
def kept_traces(place: Path) -> Iterator[None]:
    """Let the export stage read what was traced before, and keep what was not."""
    fresh = tracing.traced
    tracing.traced = functools.partial(recall, place, fresh)
    try:
        yield
    finally:
        tracing.traced = fresh


def recall(place: Path, fresh: Traced, graph: Any, opset: int) -> ir.Model:
    """Return a trace that is kept in `place`, or a fresh one, which is kept then."""
    try:
        name = key(graph, opset)
    except Unknown:
        return fresh(graph, opset)
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{name}.onnx"
    with FileLock(place / f"{name}.lock"):
        found = _read(path, graph.module)
        if found is None:
            _write(fresh(graph, opset), path, graph.module)
            # Not the fresh one itself: so that every run of a test gets what was read.
            found = _read(path, graph.module)
    assert found is not None, f"{path} cannot be read although it was just written"
    return found


def key(graph: Any, opset: int) -> str:
    """Return the digest of all that a trace depends on."""
    facts = _Facts(graph.module).of((graph.module, graph.arguments, graph.shapes, graph.inputs, graph.outputs, opset))
    versions = [(name, version(name)) for name in _PACKAGES]
    return hashlib.sha256(repr((sources(), versions, sys.version, facts)).encode()).hexdigest()


@functools.cache
def sources(*roots: str) -> str:
    """Return the digest of the sources of `modules`."""
    return hashlib.sha256(repr(sorted(modules(*roots).items())).encode()).hexdigest()


def modules(*roots: str) -> dict[str, bytes]:
    """Return the sources of `roots` and of all modules of edgeprune that they import, by default those that a trace may run."""
    left, seen = list(roots or (tracing.__name__, *_packaged())), dict[str, bytes]()
    while left:
        name = left.pop()
        spec = None if name in seen else _spec(name)
        if spec is None or spec.origin is None:
            continue
        seen[name] = Path(spec.origin).read_bytes()
        left += _imported(seen[name])
    return seen


def _packaged() -> Iterator[str]:
    for package in _FOUND_BY_NAME:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        yield from (f"{package}.{path.stem}" for path in sorted(Path(spec.origin).parent.glob("*.py")))


def _spec(name: str) -> Any:
    # A name that is imported from a module may be a module or anything in one.
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None


def _imported(source: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{name}" for name in names)]
        yield from (name for name in names if name.startswith("edgeprune"))


class _Facts:
    # Everything that an object holds, as nested tuples of plain values: what `pickle` would write, but the same in every run.
    def __init__(self, module: nn.Module) -> None:
        self._inputs = {id(tensor): name for name, tensor in _inputs(module)}
        self._above: set[int] = set()

    def of(self, held: Any) -> Any:
        if held is None or isinstance(held, (bool, int, float, str, bytes, torch.dtype, torch.device)):
            return repr(held)
        if isinstance(held, torch.Tensor):
            traits = str(held.dtype), tuple(held.shape), held.stride(), held.requires_grad
            return self._inputs.get(id(held)) or _digest(held), *traits
        if isinstance(held, (type, FunctionType, BuiltinFunctionType)):
            return _global(held)
        if id(held) in self._above:
            raise Unknown(f"{type(held)} holds itself.")
        self._above.add(id(held))
        found = self._parts(held)
        self._above.remove(id(held))
        return found

    def _parts(self, held: Any) -> Any:
        if isinstance(held, (set, frozenset)):
            return "set", *sorted(map(repr, map(self.of, held)))
        if type(held) in (list, tuple):
            return type(held).__name__, *map(self.of, held)
        if type(held) in (dict, OrderedDict):
            return "dict", *((self.of(name), self.of(value)) for name, value in held.items())
        if isinstance(held, PreTrainedConfig):
            return _global(type(held)), self.of({name: value for name, value in vars(held).items() if name != "_name_or_path"})
        try:
            reduced = held.__reduce_ex__(4)
        except TypeError as error:
            raise Unknown(str(error)) from error
        return reduced if isinstance(reduced, str) else tuple(self.of(list(p) if isinstance(p, Iterator) else p) for p in reduced)


def _global(held: Any) -> str:
    name = f"{held.__module__}.{held.__qualname__}"
    if "<" in name or name.partition(".")[0] not in _KNOWN:
        raise Unknown(f"The sources of {name} are not in the key.")
    return name


def _digest(tensor: torch.Tensor) -> bytes:
    numbers = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0, dtype=torch.uint8)
    return hashlib.sha256(numbers.numpy().tobytes()).digest()


def _inputs(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _write(model: ir.Model, path: Path, module: nn.Module) -> None:
    # Without the numbers of parameters and buffers, which are most of it. Whole or not at all.
    inputs = dict(_inputs(module))
    for value in model.graph.initializers.values():
        if value.name in inputs:
            value.const_value = ir.tensor([], dtype=ir.DataType.FLOAT, name=value.name)
    proto = ir.to_proto(model)
    for counter in _COUNTERS:
        proto.metadata_props.add(key=counter, value=str(getattr(model.graph._name_authority, counter)))
    content = proto.SerializeToString(deterministic=True)
    part = path.with_suffix(".part")
    part.write_bytes(hashlib.sha256(content).digest() + content)
    part.replace(path)


def _read(path: Path, module: nn.Module) -> ir.Model | None:
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, content = whole[:32], whole[32:]
    if hashlib.sha256(content).digest() != digest:
        return None
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(content))
    for counter in _COUNTERS:
        setattr(model.graph._name_authority, counter, int(model.metadata_props.pop(counter)))
    inputs = dict(_inputs(module))
    for value in model.graph.initializers.values():
        name = str(value.name)
        given = inputs.get(name)
        assert value.const_value is not None
        tensor = torch.from_numpy(value.const_value.numpy().copy()) if given is None else given.detach()
        value.const_value = TorchTensor(tensor, name)
        value.shape, value.dtype = ir.Shape(tensor.shape), value.const_value.dtype
    return model
