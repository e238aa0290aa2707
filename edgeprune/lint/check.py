"""Run the lint rules on a graph or a bundle.

A new rule is a function from a RuleContext to findings, in the module of its subject, and a line in one of the tables below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeprune.bundle import Bundle
from edgeprune.errors import UsageError
from edgeprune.lint.graph import load_graph
from edgeprune.lint.rule import Finding, Profile, Rule, RuleContext
from edgeprune.lint.rules import arguments, operators, profiles, shapes, types
from edgeprune.targets import Target

MODULES = ("Orin", "Thor")

ONNX_RULES: tuple[Rule, ...] = (  # violations of ONNX itself, for every target
    operators.unreadable_shapes,
    types.mixed_types,
    types.unusable_scales,
    arguments.short_axes,
)
ONNXRUNTIME_RULES: tuple[Rule, ...] = (
    operators.foreign_operators,
    operators.newer_onnxruntime_opset,
)
TENSORRT_RULES: tuple[Rule, ...] = (
    operators.unknown_operators,
    operators.newer_opset,
    operators.unlisted_types,
    operators.high_ranks,
    arguments.flat_arguments,
    arguments.computed_axes,
    arguments.reductions_in_scatter,
    arguments.extra_outputs,
    arguments.training_dropout,
    arguments.odd_einsum,
    arguments.refused_attributes,
    operators.partial_attention,
    operators.quantized_weights_beside_loops,
    shapes.uneven_branches,
    shapes.growing_loops,
    shapes.open_loops,
    arguments.many_selected,
    arguments.unsorted_selections,
    arguments.counted_selections,
    shapes.shapes_from_data,
    types.lacking_types,
    types.doubles,
    types.inner_bytes,
    types.zero_points,
    types.unsigned_bytes,
    types.int4_blocks,
    types.dynamic_fp4,
    types.small_floats,
    types.packed_borders,
    profiles.unknown_inputs,
    profiles.missing_ranges,
    profiles.wrong_ranks,
    profiles.disordered_ranges,
    profiles.changed_lengths,
    profiles.unequal_ranges,
    profiles.unreachable_sums,
)


def lint(
    path: Path, target: Target, profiles: Sequence[Profile] = (), *, modules: Sequence[str] | None = None, name: str = ""
) -> list[Finding]:
    """Return the findings of a graph file for a target, errors first.

    `profiles`: optimization profiles of the engine; without them, only fixed dimensions are checked. `modules`: Jetsons of
    `MODULES`; None: all of the target. `name`: the graph's name in findings, by default that of the file. Raises BundleError if the
    file is no ONNX graph, UsageError for an unknown module.
    """
    jetsons = _modules_of(target) if modules is None else tuple(modules)
    for module in jetsons:
        if module not in MODULES:
            raise UsageError(f"Unknown module {module!r}.", hint=f"Modules are: {', '.join(MODULES)}.")
    context = RuleContext(load_graph(path, name), target, tuple(profiles), jetsons)
    findings = [finding for rule in _rules_of(target) for finding in rule(context)]
    return sorted(dict.fromkeys(findings), key=lambda finding: finding.severity)


def lint_bundle(
    bundle: Bundle,
    target: Target,
    profiles_by_graph: Mapping[str, Sequence[Profile]] | None = None,
    *,
    modules: Sequence[str] | None = None,
) -> list[Finding]:
    """Return the findings of every graph of a bundle; profiles are by path in the bundle, such as `onnx/decoder.onnx`.

    Raises UsageError for profiles of a graph that the bundle does not have, and the errors of `lint`.
    """
    graphs = list(bundle.manifest.graphs)
    by_graph = profiles_by_graph or {}
    for name in by_graph:
        if name not in graphs:
            raise UsageError(f"There is no graph {name!r} in {bundle.path}.", hint=f"It has: {', '.join(graphs)}.")
    return [
        finding
        for name in graphs
        for finding in lint(bundle.file(name), target, by_graph.get(name, ()), modules=modules, name=name)
    ]


def _rules_of(target: Target) -> tuple[Rule, ...]:
    return (*ONNX_RULES, *(TENSORRT_RULES if target.tensorrt else ONNXRUNTIME_RULES))


def _modules_of(target: Target) -> tuple[str, ...]:
    named = tuple(module for module in MODULES if module in target.modules)
    return named if named or not target.tensorrt else MODULES
