"""Rules on the selection of tokens: how many TopK may take, and that the number does not depend on data."""

from __future__ import annotations

from collections.abc import Iterator

from edgeprune.lint.constants import constant
from edgeprune.lint.facts import LARGEST_K, RUN
from edgeprune.lint.findings import Finding
from edgeprune.lint.graphs import Node
from edgeprune.lint.lengths import Dim, range_of
from edgeprune.lint.subject import Subject

# Jetson's TensorRT parses them, yet how much they return is known only when they have run: no buffer has a fixed size after them.
_COUNTS_DATA = ("NonMaxSuppression", "NonZero")


def many_selected(subject: Subject) -> Iterator[Finding]:
    """Find TopK of more elements than TensorRT's, which its parser passes and its builder refuses."""
    for node in _selections(subject):
        count = _count(node)
        if count is not None and count > LARGEST_K:
            yield subject.error(node, f"TopK takes {count} elements, TensorRT at most {LARGEST_K}.", f"Keep {LARGEST_K} or fewer.")
        elif count is None:
            yield from _possibly_many(subject, node)


def short_axes(subject: Subject) -> Iterator[Finding]:
    """Find TopK of more elements than its axis has, or may have at the least length of a profile.

    TensorRT's builder looks at the usual and the greatest length alone; at the least one the engine fails when it runs.
    """
    for node in _selections(subject):
        count, dim = _count(node), _axis(node)
        if count is None or dim is None:
            continue
        if isinstance(dim, int):
            if dim < count:
                yield subject.error(node, f"TopK takes {count} elements of an axis of {dim}.", "Keep no more than there are.")
            continue
        shortest = min((range_of(dim, names) for names in subject.lengths()), key=lambda item: item.low)
        remedy = f"Give profiles in which {dim or 'the axis'} is {count} or longer."
        if shortest.known and shortest.low < count:
            yield subject.error(node, f"TopK takes {count} elements of an axis that may have {int(shortest.low)}.", remedy)
        elif not shortest.known and count > 0:
            yield subject.warning(node, f"TopK takes {count} elements of an axis whose least length is not known.", remedy)


def unsorted_selections(subject: Subject) -> Iterator[Finding]:
    """Find TopK that asks for no order; TensorRT documents sorted = 1 alone."""
    for node in _selections(subject):
        if node.attribute("sorted", 1) == 0:
            reason = "TopK has sorted = 0, and TensorRT documents sorted = 1 alone."
            remedy = "Set sorted to 1."
            yield (subject.warning if subject.tensorrt >= RUN else subject.error)(node, reason, remedy)


def counted_selections(subject: Subject) -> Iterator[Finding]:
    """Find operators that return as many elements as the data say, so that no size after them is fixed."""
    for node in subject.graph.nodes:
        if node.operator in _COUNTS_DATA:
            reason = f"How much {node.operator} returns depends on data, so no memory after it is of fixed size."
            yield subject.error(node, reason, "Keep a fixed count with TopK and Gather, or mask with Where.")
        elif node.operator == "Where" and len(node.inputs) == 1:
            reason = "Where with one input returns as much as the data say, and ONNX has it with three alone."
            yield subject.error(node, reason, "Keep a fixed count with TopK and Gather.")


def _selections(subject: Subject) -> Iterator[Node]:
    return (node for node in subject.graph.nodes if node.operator == "TopK")


def _count(node: Node) -> int | None:
    found = constant(node.scope, node.inputs[1]) if node.has_input(1) else None
    return int(found.reshape(-1)[0]) if found is not None and found.size == 1 else None


def _axis(node: Node, *, result: bool = False) -> Dim | None:
    shape = (node.output() if result else node.input(0)).shape
    axis = int(node.attribute("axis", -1))
    return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None


def _possibly_many(subject: Subject, node: Node) -> Iterator[Finding]:
    # A count computed from lengths, Min(576, visual) for instance: the length of the result tells its bounds.
    dim = _axis(node, result=True)
    if dim is None:
        return
    most = max((range_of(dim, names) for names in subject.lengths()), key=lambda item: item.high)
    if LARGEST_K < most.high < float("inf"):
        reason = f"TopK may take up to {int(most.high)} elements, TensorRT at most {LARGEST_K}."
        yield (subject.error if most.known else subject.warning)(node, reason, f"Bound the count or the profile by {LARGEST_K}.")
