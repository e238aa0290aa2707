"""Targets: the engines that read a bundle's graphs, with the opset and operators that each supports.

The decoder is the same for every target; a target defines its lowering. TensorRT versions are those of the JetPacks: 10.3 in 6.1
and 6.2, 10.13 in 7.0 and 7.1, 10.16 in 7.2. Supported operators are from the change logs of TensorRT and onnx-tensorrt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeprune.errors import UsageError, did_you_mean

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "w8a8", "fp8", "int4", "nvfp4")
KV_KINDS = ("same", "int8")
FEWEST_IN_TURN = 512  # patches of a view, for encoders that take views one after another
# What inputs of products are rounded to, by scales of samples, and its bits.
_ROUNDED = {"w8a8": ("int8", 8), "fp8": ("fp8", 8), "nvfp4": ("nvfp4", 4)}
SMALL_FLOATS = {"fp8": "FP8", "nvfp4": "FP4"}  # precisions for the GPU of Thor
_BY_SAMPLES = ("int4", *_ROUNDED)
_FLOATS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# The first with blocks in DequantizeLinear, which TensorRT reads since 10.0 for INT4 and since 10.8 for FP4 (ONNX since 23), and
# with Transpose of FP8, which ONNX Runtime's optimizer moves before DequantizeLinear in any opset.
_NARROW_OPSET = 21


@dataclass(frozen=True)
class Target:
    """An engine that reads graphs: its oldest `tensorrt` version (None: ONNX Runtime only) and its `opset`.

    `fused`: Attention, RotaryEmbedding and RMSNormalization are single nodes; otherwise they are decomposed. `blocked`: lowered for
    ONNX Runtime's CPU kernels (edgeprune/model/attention.py, export/passes/precision.py). `modules`: the machines.
    """

    name: str
    tensorrt: tuple[int, int] | None
    opset: int
    fused: bool
    modules: str
    blocked: bool = False

    @property
    def has_small_floats(self) -> bool:
        """Whether any of its machines multiplies FP8 and FP4: Thor does, Orin (SM 8.7) does not."""
        return self.tensorrt is not None and _machines(self) & {"orin", "thor"} != {"orin"}


TARGETS = {
    target.name: target
    for target in (
        Target("onnxruntime", None, 20, False, "any machine, CPU or CUDA"),
        Target("cpu", None, 23, True, "any machine without a GPU", blocked=True),
        Target("jetpack6", (10, 3), 20, False, "Orin with JetPack 6.1 or 6.2"),
        Target("jetpack7", (10, 13), 20, False, "Thor with JetPack 7.0 or 7.1"),
        Target("jetpack7.2", (10, 16), 23, True, "Orin and Thor with JetPack 7.2"),
        Target("tensorrt11", (11, 0), 23, True, "TensorRT 11"),
    )
}


def target_named(name: str) -> Target:
    """Return a target by name; raise UsageError for an unknown name."""
    if name not in TARGETS:
        raise UsageError(f"Unknown target {name!r}.", hint=target_hint(name))
    return TARGETS[name]


def target_hint(name: str) -> str:
    """Return the targets for a name that is none: those of the machine that it names, such as "orin", or all."""
    words = set(re.split(r"[^a-z0-9.]+", name.lower())) - {""}
    named = [target for target in TARGETS.values() if words & _machines(target)]
    if named:
        return f"For {name} choose: {', '.join(f'{target.name} ({target.modules})' for target in named)}."
    return f"{did_you_mean(name, TARGETS)}Targets are: {', '.join(TARGETS)}."


def _machines(target: Target) -> set[str]:
    # The names in a target's modules: Orin, Thor, JetPack and TensorRT, but not GPU.
    return {word.lower() for word in target.modules.split() if word[0].isupper() and not word.isupper()}


@dataclass(frozen=True)
class Lowering:
    """How a bundle's graphs are lowered: the `target`, and the `precision` of the weights.

    fp16: weights, matrix products and KV caches; norms, softmax, rotary embedding, residual stream and logits stay in float32.
    bf16: the same in bfloat16, which has float32's range with 8 bits of precision; for TensorRT alone.
    int8: weights only, one scale per output channel; on target "cpu" the inputs of products too. w8a8: for TensorRT, the inputs of
    products too, by scales that samples decide, except for the head and for what would lose too much. fp8: the same in FP8 (E4M3),
    for Thor; the head stays fp16, as NVIDIA's ModelOpt leaves it. int4: the weights of the decoder layers, in blocks of 128 inputs;
    all other weights are int8. nvfp4: for Thor, weights and inputs of the decoder layers, in blocks of 16 (edgeprune.model.nvfp4);
    all else is fp16. `wide`: the matrices, such as decoder.layers.0.mlp.down_proj, whose products float16 does not hold: they
    multiply in float32, with weights in float32 instead of fp16. `kv`: how decode steps keep keys and values, "same" as they are
    computed, or "int8". `roundings`: for w8a8, fp8 and nvfp4, how the inputs of matrices become narrow
    (edgeprune.model.smoothquant.Rounding), by the same names.
    """

    target: Target
    precision: str
    wide: tuple[str, ...] = ()
    kv: str = "same"
    roundings: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.kv not in KV_KINDS:
            raise UsageError(f"Unknown kind of KV cache {self.kv!r}.", hint=f"Kinds are: {', '.join(KV_KINDS)}.")
        if self.kv == "int8" and not self.target.blocked:
            raise UsageError(
                f"Target {self.target.name!r} has no 8-bit KV cache: its steps read keys and values as they are computed.",
                hint="Choose --target cpu, or leave --kv out.",
            )
        if self.precision not in PRECISIONS:
            raise UsageError(f"Unknown precision {self.precision!r}.", hint=f"Precisions are: {', '.join(PRECISIONS)}.")
        if self.target.tensorrt is None and self.precision == "bf16":
            raise UsageError(
                f"Target {self.target.name!r} has no bf16: ONNX Runtime's CPU has no products of bfloat16.",
                hint="Choose --precision fp32, int8 or int4, or the --target of a Jetson.",
            )
        if self.target.tensorrt is None and self.precision == "w8a8":
            raise UsageError(
                f"Target {self.target.name!r} has no w8a8, whose scales of activations are those of samples: it is for TensorRT.",
                hint="Choose --target cpu --precision int8, which rounds activations as they come, or the --target of a Jetson.",
            )
        if self.precision in SMALL_FLOATS and not self.target.has_small_floats:
            lacks = "ONNX Runtime has" if self.target.tensorrt is None else "Orin's GPU has"
            instead = "int4" if self.precision == "nvfp4" else "int8" if self.target.tensorrt is None else "w8a8"
            raise UsageError(
                f"Target {self.target.name!r} has no {self.precision}: {lacks} no products of {SMALL_FLOATS[self.precision]}.",
                hint=f"Choose --precision {instead}, or the --target of a Thor: "
                f"{', '.join(target.name for target in TARGETS.values() if target.has_small_floats)}.",
            )
        if self.target.blocked and self.precision == "fp16":
            raise UsageError(
                f"Target {self.target.name!r} has no fp16: its kernels multiply float32 or integers.",
                hint="Choose --precision fp32, int8 or int4.",
            )

    def check_samples(self, *, given: bool) -> None:
        """Raise UsageError if samples are given that decide nothing, or none where nothing works without."""
        if given and self.precision not in _BY_SAMPLES:
            raise UsageError(
                f"--data decides int4 weights and the scales of w8a8, fp8 and nvfp4, and the precision is {self.precision}.",
                hint="Give --precision int4, w8a8, fp8 or nvfp4, or no --data.",
            )
        if not given and self.inputs:
            bits = _ROUNDED[self.precision][1]
            raise UsageError(
                f"{self.precision} rounds activations to {bits} bits by scales that samples decide, and none are given.",
                hint="Give some about what the robot will see: --data samples.jsonl (see docs/tensorrt.md). Or round only the "
                f"weights: --precision int{bits}",
            )

    @property
    def inputs(self) -> str:
        """What samples let inputs of products be rounded to: "int8", "fp8", "nvfp4", or "" for none."""
        return _ROUNDED[self.precision][0] if self.precision in _ROUNDED else ""

    @property
    def opset(self) -> int:
        """The decoder's opset."""
        return self.opset_of("layers")

    def opset_of(self, part: str) -> int:
        """Return the opset of a part's graph; for parts see `weights_of`."""
        return max(self.target.opset, _NARROW_OPSET) if self.weights_of(part) in ("int4", "fp8", "nvfp4") else self.target.opset

    @property
    def products(self) -> str:
        """Type of matrix products and KV caches. ONNX Runtime multiplies quantized weights in float32: its CPU has no fp16."""
        is_float32 = self.precision == "fp32" or (self.target.tensorrt is None and self.precision in ("int8", "int4"))
        return "float32" if is_float32 else "bfloat16" if self.precision == "bf16" else "float16"

    def is_wide(self, part: str, weight: str) -> bool:
        """Return whether a weight of a part's graph, such as decoder.layers.0.mlp.down_proj.weight, multiplies in float32."""
        return _matrix_name(part, weight) in self.wide

    def rounding_of(self, part: str, weight: str) -> Any | None:
        """Return how the input of a weight of a part's graph becomes narrow, None if it does not."""
        return self.roundings.get(_matrix_name(part, weight))

    def rounds(self, weights: str) -> bool:
        """Return whether inputs of products with such weights are quantized to 8 bits, for integer matrix products."""
        return self.target.blocked and weights in ("int8", "int4")

    def in_turn(self, patches: int) -> bool:
        """Return whether a vision encoder takes views of so many patches one after another.

        Views of fewer hold little when they are all there, and products of few rows wait for the weights.
        """
        return self.target.blocked and patches >= FEWEST_IN_TURN

    def weights_of(self, part: str, *, rounded: bool = True) -> str:
        """Return the weight precision of a part: "layers" or "head" of the decoder, "vision", or "embedding".

        `rounded`: whether the inputs of a matrix are rounded by samples. nvfp4 has no matrix whose inputs are not.
        """
        if part == "embedding":
            return "int8" if self.rounds(self.precision) else _FLOATS[self.products]
        if (self.precision == "fp8" and part == "head") or (self.precision == "nvfp4" and (part != "layers" or not rounded)):
            return "fp16"
        return "int8" if self.precision == "w8a8" or (self.precision == "int4" and part != "layers") else self.precision


def _matrix_name(part: str, weight: str) -> str:
    name = weight.removesuffix(".weight")
    return name if part == "layers" else f"vision.{name}"


PLAIN = Lowering(TARGETS["onnxruntime"], "fp32")
