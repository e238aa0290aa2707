"""ONNX operators that TensorRT parses: since which version and on which element types.

Sources: the operator list of onnx-tensorrt 10.1; for later additions, the change logs of TensorRT and onnx-tensorrt up to 11.1; for
open questions, runs of the parser and builder of tensorrt-rtx 1.7 on one tiny graph per operator and type. Types are named as in
`onnx.TensorProto.DataType`.
"""

from __future__ import annotations

from dataclasses import dataclass

Version = tuple[int, int]

LISTED: Version = (10, 1)  # the newest published operator list with types
RUN: Version = (10, 16)  # the TensorRT with the parser of those runs

HALVES = frozenset({"FLOAT", "FLOAT16"})
FLOATS = HALVES | {"BFLOAT16"}
INTEGERS = frozenset({"INT32", "INT64"})
NUMBERS = FLOATS | INTEGERS
ANY = NUMBERS | {"BOOL"}
LOGICAL = frozenset({"BOOL"})
FP8, FP4 = frozenset({"FLOAT8E4M3FN"}), frozenset({"FLOAT4E2M1"})
QUANTIZED = frozenset({"INT8", "INT4"}) | FP8 | FP4
IMAGES = frozenset({"UINT8"})  # only for inputs and outputs of a network
DOUBLES = frozenset({"DOUBLE"})  # parsed, but computed as FLOAT
KNOWN_TYPES = ANY | QUANTIZED | IMAGES | DOUBLES | {"FLOAT8E8M0"}


@dataclass(frozen=True)
class Support:
    """An operator: supported `types`, the first TensorRT that parses it, and types that only `newer` versions accept in runs."""

    types: frozenset[str]
    since: Version = (10, 0)
    newer: frozenset[str] = frozenset()


_BY_TYPES: tuple[tuple[frozenset[str], str], ...] = (
    (
        FLOATS,
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Conv ConvTranspose Cos Cosh Einsum Elu Erf Exp "
        "Floor GRU Gelu Gemm GlobalLpPool GlobalMaxPool GridSample GroupNormalization HardSigmoid Hardmax InstanceNormalization "
        "IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Log LogSoftmax LpPool MatMul MaxPool Mean MeanVarianceNormalization "
        "PRelu RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal ReduceL2 ReduceLogSum "
        "ReduceLogSumExp Resize Round Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample",
    ),
    (HALVES, "DeformConv HardSwish LpNormalization Mish NonMaxSuppression NonZero RoiAlign"),
    (
        NUMBERS,
        "Abs Add ArgMax ArgMin DepthToSpace Div Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Neg ReduceL1 ReduceMax "
        "ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Scatter Sign SpaceToDepth Sub Sum TopK",
    ),
    (
        ANY,
        "Concat Constant ConstantOfShape Dropout Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot "
        "Reshape ReverseSequence Scan Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    ),
    (ANY | IMAGES | QUANTIZED, "Cast CastLike"),
    (LOGICAL, "And Not Or Xor"),
)

OPERATORS: dict[str, Support] = {name: Support(types) for types, names in _BY_TYPES for name in names.split()} | {
    "Range": Support(INTEGERS | {"FLOAT"}),
    "Shrink": Support(HALVES | INTEGERS),
    "QuantizeLinear": Support(FLOATS),
    "DequantizeLinear": Support(QUANTIZED | {"FLOAT8E8M0"}),
    # Not in the list of 10.1 with these types; RTX 1.7 builds them.
    "Clip": Support(FLOATS, newer=INTEGERS),
    "CumSum": Support(FLOATS, newer=INTEGERS),
    "Equal": Support(NUMBERS, newer=LOGICAL),
    "GlobalAveragePool": Support(FLOATS, newer=INTEGERS),
    "Pad": Support(NUMBERS, newer=LOGICAL),
    "Pow": Support(FLOATS, newer=INTEGERS),
    "ScatterElements": Support(NUMBERS, newer=LOGICAL),
    "ScatterND": Support(NUMBERS, newer=LOGICAL),
    # Newer than the list of 10.1; versions are from the change logs, or from the runs if no log names the operator.
    "Attention": Support(FLOATS, since=(10, 14)),
    "RMSNormalization": Support(FLOATS, since=(10, 15)),
    "RotaryEmbedding": Support(FLOATS, since=(10, 15)),
    "TensorScatter": Support(ANY, since=(10, 15)),
    "BlackmanWindow": Support(INTEGERS, since=RUN),
    "HammingWindow": Support(INTEGERS, since=RUN),
    "HannWindow": Support(INTEGERS, since=RUN),
    "STFT": Support(FLOATS, since=RUN),
    "Swish": Support(FLOATS, since=(11, 0)),
}

# Operators that move elements without computing on them; quantized values may pass through them.
_MOVERS = (
    "Concat Constant ConstantOfShape Expand Flatten Gather GatherElements GatherND Identity Pad Reshape ReverseSequence Shape Size "
    "Slice Split Squeeze Tile Transpose Unsqueeze Where"
)
MOVERS = frozenset(_MOVERS.split())

# TensorRT's own operators, which its parser accepts in any domain.
DYNAMIC_FP4 = "TRT_FP4DynamicQuantize"
OWN_OPERATORS: dict[str, Version] = {
    DYNAMIC_FP4: (10, 8),
    **{name: (11, 0) for name in ("TRT_Attention", "TRT_KVCacheUpdate", "TRT_MoE")},
}

# Index of the input that determines the type, if not the first; None: the output does.
TYPED_INPUT: dict[str, int | None] = {
    "Where": 1,
    "OneHot": 2,
    "Constant": None,
    "ConstantOfShape": None,
    "EyeLike": None,
    "RandomNormal": None,
    "RandomNormalLike": None,
    "RandomUniform": None,
    "RandomUniformLike": None,
}

_QUANTIZED_FORM = "Quantize with QuantizeLinear and DequantizeLinear around the ordinary operator."
_FIXED_COUNT = "Keep a fixed count with TopK and Gather."
_BOOLEANS = "Compute on booleans with And, Or, Xor and Not."
_SEQUENCES = "Use tensors with Concat, Split and Gather in place of sequences."

# Remedies for operators that no TensorRT parses. Others have a generic remedy.
INSTEAD: dict[str, str] = {
    "BitwiseAnd": _BOOLEANS,
    "BitwiseNot": _BOOLEANS,
    "BitwiseOr": _BOOLEANS,
    "BitwiseXor": _BOOLEANS,
    "Bernoulli": "Draw the random numbers outside and make them an input.",
    "Compress": _FIXED_COUNT,
    "ConcatFromSequence": _SEQUENCES,
    "ConvInteger": _QUANTIZED_FORM,
    "DynamicQuantizeLinear": _QUANTIZED_FORM,
    "MatMulInteger": _QUANTIZED_FORM,
    "MatMulNBits": "Store the weights as INT4 behind a DequantizeLinear with block_size.",
    "Multinomial": "Output the logits and sample outside the graph.",
    "QLinearConv": _QUANTIZED_FORM,
    "QLinearMatMul": _QUANTIZED_FORM,
    "SequenceAt": _SEQUENCES,
    "SequenceConstruct": _SEQUENCES,
    "SequenceEmpty": _SEQUENCES,
    "SequenceErase": _SEQUENCES,
    "SequenceInsert": _SEQUENCES,
    "SequenceLength": _SEQUENCES,
    "SequenceMap": _SEQUENCES,
    "SplitToSequence": _SEQUENCES,
    "Unique": _FIXED_COUNT,
}

# The newest opset that a TensorRT is known to parse, by documentation (10.0), the onnx version it is built with (10.6), its newest
# operators (10.14), and the runs.
_OPSETS: tuple[tuple[Version, int], ...] = (((10, 0), 20), ((10, 6), 22), ((10, 14), 24), (RUN, 26))
NEWEST_ONNXRUNTIME_OPSET = 21  # of onnxruntime 1.20, the oldest supported version

LARGEST_K = 3840  # of TopK; the parser accepts more, the builder does not
LARGEST_RANK = 8
INT4_BLOCKS = (16, 32, 64, 128)  # block sizes in the documentation and the runs
FP4_BLOCK = 16  # of activations, in the documentation of DynamicQuantize and the runs
FP8_MODULES = FP4_MODULES = frozenset({"Thor"})  # Orin's sm_87 has neither


def newest_opset(tensorrt: Version) -> int:
    """Return the newest opset that a TensorRT is known to read."""
    return max(opset for since, opset in _OPSETS if since <= tensorrt)
