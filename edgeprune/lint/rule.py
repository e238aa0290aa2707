"""The interface of lint rules: a RuleContext in, a Finding out for each thing that a target refuses or silently changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from edgeprune.lint.graph import Graph, Node, Value
from edgeprune.lint.operator_support import Version
from edgeprune.lint.values import Range
from edgeprune.targets import Target

Severity = Literal["error", "warning"]

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # input name -> min, opt and max shape


@dataclass(frozen=True)
class Finding:
    """Something in a graph that a target refuses (severity "error") or may treat unexpectedly ("warning").

    `node` is the name of a node, or of a tensor with `operator` empty. `reason` and `remedy` are one sentence each.
    """

    graph: str
    node: str
    operator: str
    reason: str
    remedy: str
    severity: Severity

    def __str__(self) -> str:
        place = f"{self.graph}: {self.node} ({self.operator})" if self.operator else f"{self.graph}: {self.node}"
        return f"{self.severity}: {place}: {self.reason} {self.remedy}"


@dataclass(frozen=True)
class RuleContext:
    """The input of a rule: a graph, a target, the optimization profiles of the build, and the Jetsons (`modules`)."""

    graph: Graph
    target: Target
    profiles: tuple[Profile, ...]
    modules: tuple[str, ...]

    @property
    def tensorrt(self) -> Version:
        """The target's TensorRT version. TensorRT rules run only for targets that have one."""
        assert self.target.tensorrt is not None
        return self.target.tensorrt

    def error(self, place: Node | Value | str, reason: str, remedy: str) -> Finding:
        """Return a finding of severity error."""
        return self._finding(place, reason, remedy, "error")

    def warning(self, place: Node | Value | str, reason: str, remedy: str) -> Finding:
        """Return a finding of severity warning."""
        return self._finding(place, reason, remedy, "warning")

    def lengths(self) -> Iterator[Mapping[str, Range]]:
        """Yield the ranges of dimension names for each profile; one empty mapping if there is no profile."""
        for profile in self.profiles or ({},):
            yield ranges_of(self.graph, profile)

    def _finding(self, place: Node | Value | str, reason: str, remedy: str, severity: Severity) -> Finding:
        name = place if isinstance(place, str) else place.name
        operator = place.operator if isinstance(place, Node) else ""
        return Finding(self.graph.name, name, operator, reason, remedy, severity)


Rule = Callable[[RuleContext], Iterator[Finding]]


def ranges_of(graph: Graph, profile: Profile) -> dict[str, Range]:
    """Return the ranges of dimension names in a profile; the union if a name has several ranges."""
    ranges: dict[str, Range] = {}
    for value, dims in _dynamic_dims(graph):
        low, _, high = profile.get(value.name, ((), (), ()))
        for axis, dim in dims:
            if axis < min(len(low), len(high)):
                known = ranges.get(dim, Range(low[axis], high[axis]))
                ranges[dim] = Range(min(known.low, low[axis]), max(known.high, high[axis]))
    return ranges


def _dynamic_dims(graph: Graph) -> Iterator[tuple[Value, list[tuple[int, str]]]]:
    for value in graph.inputs:
        yield value, [(axis, dim) for axis, dim in enumerate(value.shape or ()) if isinstance(dim, str) and dim]
