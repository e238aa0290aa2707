"""What a rule of the lint is given, and what it returns: a Finding for each thing that a target refuses or changes silently."""

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
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # input name -> least, usual and greatest shape


@dataclass(frozen=True)
class Finding:
    """One thing in a graph that a target refuses (`error`) or that may surprise (`warning`).

    `node` is the name of a node or, where no node is at fault, of a tensor; `operator` is empty then. `reason` says what is wrong
    and `remedy` what to do, one sentence each.
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
    """One graph under one target, with the profiles that it will be built with and the Jetsons that are meant."""

    graph: Graph
    target: Target
    profiles: tuple[Profile, ...]
    modules: tuple[str, ...]

    @property
    def tensorrt(self) -> Version:
        """The target's TensorRT; rules of TensorRT run for no other target."""
        assert self.target.tensorrt is not None
        return self.target.tensorrt

    def error(self, place: Node | Value | str, reason: str, remedy: str) -> Finding:
        """Return a finding that the target refuses."""
        return self._finding(place, reason, remedy, "error")

    def warning(self, place: Node | Value | str, reason: str, remedy: str) -> Finding:
        """Return a finding that may surprise."""
        return self._finding(place, reason, remedy, "warning")

    def lengths(self) -> Iterator[Mapping[str, Range]]:
        """Yield, for each profile, the ranges of the names of dimensions; one without names where there is no profile."""
        for profile in self.profiles or ({},):
            yield ranges_of(self.graph, profile)

    def _finding(self, place: Node | Value | str, reason: str, remedy: str, severity: Severity) -> Finding:
        name = place if isinstance(place, str) else place.name
        operator = place.operator if isinstance(place, Node) else ""
        return Finding(self.graph.name, name, operator, reason, remedy, severity)


Rule = Callable[[RuleContext], Iterator[Finding]]


def ranges_of(graph: Graph, profile: Profile) -> dict[str, Range]:
    """Return the ranges of the names of dimensions under one profile; of a name with several ranges, the widest."""
    ranges: dict[str, Range] = {}
    for value, dims in _dynamic(graph):
        low, _, high = profile.get(value.name, ((), (), ()))
        for axis, dim in dims:
            if axis < min(len(low), len(high)):
                known = ranges.get(dim, Range(low[axis], high[axis]))
                ranges[dim] = Range(min(known.low, low[axis]), max(known.high, high[axis]))
    return ranges


def _dynamic(graph: Graph) -> Iterator[tuple[Value, list[tuple[int, str]]]]:
    for value in graph.inputs:
        yield value, [(axis, dim) for axis, dim in enumerate(value.shape or ()) if isinstance(dim, str) and dim]
