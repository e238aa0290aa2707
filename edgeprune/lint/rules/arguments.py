"""Rules on arguments: inputs that must be constants, refused outputs and attributes, and token selection.

Selection: TopK must not take too many elements, and the number must not depend on data.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgeprune.lint.graph import Dim, Node
from edgeprune.lint.operator_support import LARGEST_K, RUN, Version
from edgeprune.lint.rule import Finding, RuleContext
from edgeprune.lint.values import constant, is_constant, range_of

# Operator -> index of the input that must be an initializer or be computed from initializers only.
_CONSTANT_INPUTS = {"CumSum": 1, "Pad": 3, "Slice": 3, "Squeeze": 1, "Unsqueeze": 1} | {
    f"Reduce{name}": 1 for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
}
_FIRST_OUTPUT_ONLY = ("LayerNormalization", "MaxPool")
_EINSUM_SINCE: Version = (10, 12)  # with ellipsis, diagonals and broadcast
# Operator -> attribute -> accepted values, of each element if the attribute is a list; the first is the default.
_ATTRIBUTES: dict[str, dict[str, tuple[int | str, ...]]] = {
    "AveragePool": {"dilations": (1,)},
    "BatchNormalization": {"training_mode": (0,)},
    "LSTM": {"input_forget": (0,), "layout": (0,)},
    "LpPool": {"dilations": (1,), "p": (2, 1)},
    "MaxPool": {"dilations": (1,)},
    "Resize": {
        "antialias": (0,),
        "coordinate_transformation_mode": (
            "half_pixel",
            "pytorch_half_pixel",
            "tf_half_pixel_for_nn",
            "asymmetric",
            "align_corners",
        ),
        "keep_aspect_ratio_policy": ("stretch",),
    },
    "TensorScatter": {"mode": ("linear",), "axis": (-2,)},
}

# TensorRT for Jetson parses these, but their output size depends on data, so later buffers have no fixed size.
_DATA_DEPENDENT = ("NonMaxSuppression", "NonZero")


def flat_arguments(context: RuleContext) -> Iterator[Finding]:
    """Find ArgMax and ArgMin on tensors of fewer than two dimensions."""
    for node in context.graph.nodes:
        shape = node.input(0).shape
        if node.operator in ("ArgMax", "ArgMin") and shape is not None and len(shape) < 2:
            reason = f"TensorRT takes {node.operator} on two dimensions or more, this input has {len(shape)}."
            yield context.error(node, reason, "Keep a leading dimension of 1 and squeeze the result.")


def computed_axes(context: RuleContext) -> Iterator[Finding]:
    """Find computed axes of operators that need constant axes at build time."""
    for node in context.graph.nodes:
        index = _CONSTANT_INPUTS.get(node.operator)
        if index is not None and node.has_input(index) and not is_constant(node.scope, node.inputs[index]):
            reason = f"The axes of {node.operator} are computed, and TensorRT needs them as a constant."
            yield context.error(node, reason, "Make the axes an initializer.")


def reductions_in_scatter(context: RuleContext) -> Iterator[Finding]:
    """Find scatter operators with a reduction: ScatterND is refused, ScatterElements needs a plugin library."""
    for node in context.graph.nodes:
        reduction = node.attribute("reduction", "none")
        if node.operator == "ScatterND" and reduction != "none":
            reason = f"TensorRT does not take ScatterND with reduction {reduction}."
            yield context.error(node, reason, "Sum with MatMul on a one-hot matrix, or scatter without reduction.")
        if node.operator == "ScatterElements" and reduction != "none":
            reason = f"ScatterElements with reduction {reduction} is a plugin, which not every TensorRT carries."
            yield context.warning(node, reason, "Scatter without reduction, or install libnvinfer_plugin on the device.")


def extra_outputs(context: RuleContext) -> Iterator[Finding]:
    """Find uses of additional outputs that TensorRT does not compute."""
    for node in context.graph.nodes:
        if node.operator in _FIRST_OUTPUT_ONLY and any(node.outputs[1:]):
            reason = f"TensorRT computes the first output of {node.operator} alone, and the node has {len(node.outputs)}."
            yield context.error(node, reason, "Drop the other outputs, or compute them with operators of their own.")


def training_dropout(context: RuleContext) -> Iterator[Finding]:
    """Find Dropout that may be in training mode."""
    for node in context.graph.nodes:
        if node.operator == "Dropout" and node.has_input(2):
            mode = constant(node.scope, node.inputs[2])
            if mode is None or bool(mode.any()):
                yield context.error(node, "TensorRT takes Dropout that is off for certain.", "Export the model in evaluation mode.")


def odd_einsum(context: RuleContext) -> Iterator[Finding]:
    """Find Einsum with an ellipsis or a diagonal if the target's TensorRT does not support it."""
    for node in context.graph.nodes:
        if node.operator != "Einsum" or context.tensorrt >= _EINSUM_SINCE:
            continue
        equation = node.attribute("equation", "").replace(" ", "")
        terms = equation.split("->")[0].split(",")
        if "..." in equation or any(len(set(term)) < len(term) for term in terms):
            reason = f"The equation {equation} has an ellipsis or a diagonal, which TensorRT takes since 10.12."
            yield context.error(node, reason, "Write it as Transpose, Reshape and MatMul.")


def refused_attributes(context: RuleContext) -> Iterator[Finding]:
    """Find attribute values that TensorRT does not accept."""
    for node in context.graph.nodes:
        for name, accepted in _ATTRIBUTES.get(node.operator, {}).items():
            value = node.attribute(name, accepted[0])
            if any(item not in accepted for item in (value if isinstance(value, list) else [value])):
                reason = f"TensorRT does not take {node.operator} with {name} = {value}."
                yield context.error(node, reason, f"Set {name} to {' or '.join(map(str, accepted))}.")


def many_selected(context: RuleContext) -> Iterator[Finding]:
    """Find TopK with more elements than TensorRT's limit, which the parser accepts and the builder refuses."""
    for node in _selections(context):
        count = _count(node)
        if count is not None and count > LARGEST_K:
            yield context.error(node, f"TopK takes {count} elements, TensorRT at most {LARGEST_K}.", f"Keep {LARGEST_K} or fewer.")
        elif count is None:
            yield from _possibly_many(context, node)


def short_axes(context: RuleContext) -> Iterator[Finding]:
    """Find TopK with more elements than its axis has, or has at the min length of a profile.

    TensorRT's builder checks only the opt and max lengths; at the min length the engine fails at run time.
    """
    for node in _selections(context):
        count, dim = _count(node), _axis(node)
        if count is None or dim is None:
            continue
        if isinstance(dim, int):
            if dim < count:
                yield context.error(node, f"TopK takes {count} elements of an axis of {dim}.", "Keep no more than there are.")
            continue
        shortest = min((range_of(dim, names) for names in context.lengths()), key=lambda item: item.low)
        remedy = f"Give profiles in which {dim or 'the axis'} is {count} or longer."
        if shortest.known and shortest.low < count:
            yield context.error(node, f"TopK takes {count} elements of an axis that may have {int(shortest.low)}.", remedy)
        elif not shortest.known and count > 0:
            yield context.warning(node, f"TopK takes {count} elements of an axis whose least length is not known.", remedy)


def unsorted_selections(context: RuleContext) -> Iterator[Finding]:
    """Find TopK with sorted = 0; TensorRT documents only sorted = 1."""
    for node in _selections(context):
        if node.attribute("sorted", 1) == 0:
            reason = "TopK has sorted = 0, and TensorRT documents sorted = 1 alone."
            remedy = "Set sorted to 1."
            yield (context.warning if context.tensorrt >= RUN else context.error)(node, reason, remedy)


def counted_selections(context: RuleContext) -> Iterator[Finding]:
    """Find operators whose output size depends on data."""
    for node in context.graph.nodes:
        if node.operator in _DATA_DEPENDENT:
            reason = f"How much {node.operator} returns depends on data, so no memory after it is of fixed size."
            yield context.error(node, reason, "Keep a fixed count with TopK and Gather, or mask with Where.")
        elif node.operator == "Where" and len(node.inputs) == 1:
            reason = "Where with one input returns as much as the data say, and ONNX has it with three alone."
            yield context.error(node, reason, "Keep a fixed count with TopK and Gather.")


def _selections(context: RuleContext) -> Iterator[Node]:
    return (node for node in context.graph.nodes if node.operator == "TopK")


def _count(node: Node) -> int | None:
    found = constant(node.scope, node.inputs[1]) if node.has_input(1) else None
    return int(found.reshape(-1)[0]) if found is not None and found.size == 1 else None


def _axis(node: Node, *, result: bool = False) -> Dim | None:
    shape = (node.output() if result else node.input(0)).shape
    axis = int(node.attribute("axis", -1))
    return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None


def _possibly_many(context: RuleContext, node: Node) -> Iterator[Finding]:
    # The count is computed from lengths, such as Min(576, visual); the result's dimension bounds it.
    dim = _axis(node, result=True)
    if dim is None:
        return
    most = max((range_of(dim, names) for names in context.lengths()), key=lambda item: item.high)
    if LARGEST_K < most.high < float("inf"):
        reason = f"TopK may take up to {int(most.high)} elements, TensorRT at most {LARGEST_K}."
        yield (context.error if most.known else context.warning)(node, reason, f"Bound the count or the profile by {LARGEST_K}.")
