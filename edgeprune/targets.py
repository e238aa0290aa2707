"""Targets: what will read the graphs of a bundle, and which ONNX they may therefore use.

The decoder is the same everywhere; a target says how it is lowered. Versions are those that the JetPacks carry: 6.1 and 6.2
TensorRT 10.3, 7.0 and 7.1 10.13, 7.2 10.16. Which operator is parsed since when: the change logs of TensorRT and onnx-tensorrt.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune.errors import UsageError

PRECISIONS = ("fp32", "fp16", "int8", "int4")
_INT4_OPSET = 21  # the first whose DequantizeLinear takes INT4 in blocks; TensorRT reads such nodes since 10.0


@dataclass(frozen=True)
class Target:
    """One reader of graphs: its oldest `tensorrt` (None: ONNX Runtime alone), the `opset`, and the operators it has.

    `fused`: Attention, RotaryEmbedding and RMSNormalization are nodes; otherwise they are decomposed. `blocked`: written for the
    kernels that ONNX Runtime has for CPUs (edgeprune/model/attention.py, export/passes/precision.py). `modules`: the machines.
    """

    name: str
    tensorrt: tuple[int, int] | None
    opset: int
    fused: bool
    modules: str
    blocked: bool = False


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
    """Return a target; raise UsageError with the known names for another."""
    if name not in TARGETS:
        raise UsageError(f"Unknown target {name!r}.", hint=f"Targets are: {', '.join(TARGETS)}.")
    return TARGETS[name]


@dataclass(frozen=True)
class Lowering:
    """How a bundle's graphs are written: for which `target`, and in which `precision` their weights are kept.

    fp16: weights, matrix products and KV caches; norms, softmax, rotation, the residual stream and logits stay in float32. int8:
    weights alone, one scale for each output, on "cpu" also what they meet; int4: the weights of the decoder's layers, in blocks of
    128 inputs, the rest int8.
    """

    target: Target
    precision: str

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"Unknown precision {self.precision!r}.", hint=f"Precisions are: {', '.join(PRECISIONS)}.")
        if self.target.blocked and self.precision == "fp16":
            raise UsageError(
                f"Target {self.target.name!r} has no fp16: its kernels multiply float32 or integers.",
                hint="Choose --precision fp32, int8 or int4.",
            )

    @property
    def opset(self) -> int:
        """The opset of the decoder."""
        return self.opset_of("layers")

    def opset_of(self, part: str) -> int:
        """Return the opset of a part's graph."""
        return max(self.target.opset, _INT4_OPSET) if self.weights_of(part) == "int4" else self.target.opset

    @property
    def products(self) -> str:
        """The type of matrix products and KV caches. Quantized weights meet float32 on ONNX Runtime, whose CPU has no fp16."""
        whole = self.precision == "fp32" or (self.target.tensorrt is None and self.precision in ("int8", "int4"))
        return "float32" if whole else "float16"

    def rounds(self, weights: str) -> bool:
        """Whether states that meet weights of this kind are rounded to 8 bits, for products of integers."""
        return self.target.blocked and weights in ("int8", "int4")

    def weights_of(self, part: str) -> str:
        """Return how the matrices of a part are kept: "layers" and "head" of the decoder, "vision", or "embedding"."""
        if part == "embedding":
            return "int8" if self.rounds(self.precision) else "fp32" if self.products == "float32" else "fp16"
        return "int8" if self.precision == "int4" and part != "layers" else self.precision


PLAIN = Lowering(TARGETS["onnxruntime"], "fp32")
