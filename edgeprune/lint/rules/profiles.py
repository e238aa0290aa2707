"""Rules on optimization profiles: shape ranges must be consistent with the graph and with each other."""

from __future__ import annotations

from collections.abc import Iterator

from edgeprune.lint.graph import Value
from edgeprune.lint.rule import Finding, Profile, RuleContext, Shape, ranges_of
from edgeprune.lint.values import range_of


def unknown_inputs(context: RuleContext) -> Iterator[Finding]:
    """Find ranges of inputs that the graph does not have."""
    names = {value.name for value in context.graph.inputs}
    for number, profile in _numbered(context):
        for name in profile:
            if name not in names:
                yield context.error(name, f"{number} gives a range for {name}, which is no input.", "Leave it out of the profile.")


def missing_ranges(context: RuleContext) -> Iterator[Finding]:
    """Find inputs of dynamic shape without a range, which the builder refuses."""
    for number, profile in _numbered(context):
        for value in context.graph.inputs:
            if value.name not in profile and any(isinstance(dim, str) for dim in value.shape or ()):
                reason = f"{number} gives no range for {value.name}, whose shape is dynamic."
                yield context.error(value, reason, "Give its least, usual and greatest shape.")


def wrong_ranks(context: RuleContext) -> Iterator[Finding]:
    """Find ranges whose rank differs from that of their input."""
    for number, value, shapes in _ranges(context):
        found = sorted({len(shape) for shape in shapes} - {len(value.shape or ())})
        if found:
            reason = f"{number} gives {value.name} shapes of {found[0]} dimensions, the input has {len(value.shape or ())}."
            yield context.error(value, reason, "Give one length for each dimension.")


def disordered_ranges(context: RuleContext) -> Iterator[Finding]:
    """Find ranges that violate 0 <= min <= opt <= max in a dimension."""
    for number, value, (low, usual, high) in _ranges(context):
        for axis, (least, middle, most) in enumerate(zip(low, usual, high, strict=False)):
            if not 0 <= least <= middle <= most:
                reason = f"{number} gives dimension {axis} of {value.name} the lengths {least}, {middle} and {most}."
                yield context.error(value, reason, "Give 0 <= min <= opt <= max.")


def changed_lengths(context: RuleContext) -> Iterator[Finding]:
    """Find ranges that differ from a fixed dimension of the graph."""
    for number, value, shapes in _ranges(context):
        for axis, dim in enumerate(value.shape or ()):
            others = {shape[axis] for shape in shapes if axis < len(shape)} - {dim}
            if isinstance(dim, int) and others:
                reason = f"{number} gives dimension {axis} of {value.name} the length {min(others)}, the graph fixes it to {dim}."
                yield context.error(value, reason, f"Give {dim} in all three shapes.")


def unequal_ranges(context: RuleContext) -> Iterator[Finding]:
    """Find inputs that share a dimension name but have different ranges, which TensorRT does not detect."""
    for number, profile in _numbered(context):
        first: dict[str, tuple[str, tuple[int, ...]]] = {}
        for value, axis, dim in _named_dims(context):
            if value.name not in profile or any(axis >= len(shape) for shape in profile[value.name]):
                continue
            lengths = tuple(shape[axis] for shape in profile[value.name])
            other, expected = first.setdefault(dim, (value.name, lengths))
            if lengths != expected:
                reason = f"{number} gives {dim} the lengths {_span(expected)} in {other} and {_span(lengths)} in {value.name}."
                yield context.error(value, reason, f"Give {dim} one range in all inputs.")


def unreachable_sums(context: RuleContext) -> Iterator[Finding]:
    """Find inputs whose length is a sum of other lengths and whose range does not cover that sum."""
    for number, profile in _numbered(context):
        names = ranges_of(context.graph, profile)
        for value, axis, dim in _named_dims(context):
            others = {name: length for name, length in names.items() if name != dim}
            needed = range_of(dim, others)
            if dim.isidentifier() or not needed.known or dim not in names:
                continue
            if names[dim].low > needed.low or names[dim].high < needed.high:
                reachable, lengths = _span((needed.low, needed.high)), _span((names[dim].low, names[dim].high))
                reason = f"{number} gives dimension {axis} of {value.name} lengths of {lengths}, but {dim} reaches {reachable}."
                yield context.error(value, reason, "Give it the range that the others add up to.")


def _numbered(context: RuleContext) -> Iterator[tuple[str, Profile]]:
    return ((f"Profile {index}", profile) for index, profile in enumerate(context.profiles))


def _ranges(context: RuleContext) -> Iterator[tuple[str, Value, tuple[Shape, Shape, Shape]]]:
    for number, profile in _numbered(context):
        for value in context.graph.inputs:
            if value.name in profile and value.shape is not None:
                yield number, value, profile[value.name]


def _named_dims(context: RuleContext) -> Iterator[tuple[Value, int, str]]:
    for value in context.graph.inputs:
        yield from ((value, axis, dim) for axis, dim in enumerate(value.shape or ()) if isinstance(dim, str) and dim)


def _span(lengths: tuple[float, ...]) -> str:
    return " to ".join(str(int(length)) for length in (lengths[0], lengths[-1]))
