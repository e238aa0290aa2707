"""Roofline estimate of an answer's cost on a module: operations over peak compute, bytes over bandwidth (Williams et al. 2009).

A stage takes the larger of the two, because an engine overlaps them, plus its kernel launches. Every time is a range, because the
share of a peak that an engine reaches is known only roughly. docs/roofline.md compares the midpoints with published measurements.
Not counted: image decoding and resizing, tokenization, sampling, and thermal throttling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeprune.bundle import Operations
from edgeprune.device.jetson import Module
from edgeprune.device.workload import Workload


@dataclass(frozen=True)
class Interval:
    """A lower and an upper bound."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """The mean of both bounds."""
        return (self.low + self.high) / 2

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)


# Shares of the peaks that engines reach. Orin's FP16 is fitted to published prefill and vision times of Qwen3-VL: docs/roofline.md.
# No published row is limited by FP32 or by Thor's FP16, which are assumed equal to it. None is limited by narrower types either;
# their lower bound is for products too small for wider units.
_COMPUTE = {
    ((8, 7), "fp32"): Interval(0.38, 0.54),
    ((8, 7), "fp16"): Interval(0.38, 0.54),
    ((8, 7), "int8"): Interval(0.3, 0.54),
    ((11, 0), "fp32"): Interval(0.38, 0.54),
    ((11, 0), "fp16"): Interval(0.38, 0.54),
    ((11, 0), "int8"): Interval(0.25, 0.54),
    ((11, 0), "fp8"): Interval(0.25, 0.54),
    ((11, 0), "fp4"): Interval(0.2, 0.54),
}
# The same for integer weights that are unpacked to FP16. Published INT4 prefill reaches 0.09 on Thor with Orin's kernels; the upper
# bound allows for better kernels.
_UNPACKED = {(8, 7): Interval(0.38, 0.54), (11, 0): Interval(0.08, 0.2)}
_BANDWIDTH = Interval(0.75, 0.95)  # fitted to published decode rates
_LAUNCH_MS = Interval(0.001, 0.006)  # per kernel, with or without a CUDA graph: fitted to decode rates of small models
_KERNELS = 12  # per transformer layer in an engine: products, attention, rotary embedding, norms, cache
# CUDA context, libraries and workspaces: published memory of Orin Nano and NX minus the weights.
RUNTIME_BYTES = Interval(1.0e9, 2.0e9)
# Orin Nano's firmware keeps 0.6 GB (tegrastats shows 7620 of 8192 MiB); the rest, without and with a desktop, is assumed.
_SYSTEM_BYTES = Interval(1.0e9, 2.5e9)


@dataclass(frozen=True)
class Peaks:
    """Measured peaks of a machine with `threads` threads (None: all).

    `operations`: per second, by arithmetic ("fp32", "fp16", "int8"). `bandwidth`: bytes per second.
    """

    operations: Mapping[str, float]
    bandwidth: float
    threads: int | None

    def least_ms(self, work: Operations, arithmetic: str, moved: float) -> float:
        """Return a stage's lower bound in ms: the larger of its operations at peak and its `moved` bytes at full bandwidth.

        Attention is always floating point.
        """
        between = "fp32" if arithmetic == "int8" else arithmetic
        compute = work.products / self.operations[arithmetic] + work.attention / self.operations[between]
        return 1e3 * max(compute, moved / self.bandwidth)


@dataclass(frozen=True)
class Stage:
    """A stage: operations, bytes moved, milliseconds, and its `limit` at the midpoint: "compute", "bandwidth" or "launches"."""

    name: str
    operations: float
    bytes: Interval
    ms: Interval
    limit: str


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of memory, which CPU and GPU share on the module.

    `weight_parts`: the weights of each part of the model. `embedding`: the table of token embeddings, which stays in its file.
    `file_cache`: cached pages of the weight files, the table's included, which the system reclaims when needed. `system`: what
    firmware and operating system take, which is not counted at rest and at peak.
    """

    weight_parts: Mapping[str, float]
    embedding: float
    kv: float
    activations: float
    runtime: Interval
    file_cache: float
    system: Interval
    ram: int

    @property
    def weights(self) -> float:
        """The weights of all parts, without the table of embeddings."""
        return sum(self.weight_parts.values())

    @property
    def at_rest(self) -> Interval:
        """Memory when loaded and idle."""
        return Interval(self.weights, self.weights) + self.runtime

    @property
    def at_peak(self) -> Interval:
        """Memory with the complete answer's KV cache and the largest activations, without the file cache."""
        extra = self.kv + self.activations
        return self.at_rest + Interval(extra, extra)

    @property
    def needed(self) -> Interval:
        """The peak and what the system takes beside it."""
        return self.at_peak + self.system

    @property
    def fits(self) -> str:
        """Whether the peak fits in memory beside the system: "yes", "no", or "perhaps" if only the lower bounds do."""
        if self.needed.high < self.ram:
            return "yes"
        return "perhaps" if self.needed.low < self.ram else "no"


@dataclass(frozen=True)
class Estimate:
    """The stages of an answer in order, the last being one decode step, and the memory."""

    stages: tuple[Stage, ...]
    memory: MemoryEstimate

    @property
    def ttft_ms(self) -> Interval:
        """Milliseconds to the first token: all stages before decode."""
        return sum((stage.ms for stage in self.stages[:-1]), Interval(0.0, 0.0))

    @property
    def token_ms(self) -> Interval:
        """Milliseconds of each token after the first."""
        return self.stages[-1].ms

    def stage(self, name: str) -> Stage | None:
        """Return a stage by name; None if the workload does not have it."""
        return next((stage for stage in self.stages if stage.name == name), None)


def estimate(work: Workload, module: Module) -> Estimate:
    """Estimate a workload on a module; raise UsageError if the module lacks its arithmetic."""
    selection = (_selection(work, module),) if work.selector else ()
    stages = (_vision(work, module), *selection, _prefill(work, module), _decode(work, module))
    return Estimate(stages, _memory(work, module))


def prefill_operations(work: Workload) -> Operations:
    """Return the decoder's operations of prefill, with the visual tokens that each layer has."""
    decoder = work.decoder
    tokens = [alive + work.text_tokens for alive in work.alive]
    products = sum(2.0 * weights * count for weights, count in zip(decoder.layer_parameters, tokens, strict=True))
    pairs = sum(decoder.pairs(layer, alive, work.text_tokens) for layer, alive in enumerate(work.alive))
    # Two products for each pair of tokens. The output head runs on the last token only.
    attention = 4.0 * decoder.attention_width * pairs + decoder.state_operations(tokens)
    return Operations(2.0 * decoder.head + products, attention)


def decode_operations(work: Workload, generated: float) -> Operations:
    """Return the decoder's operations for the token after `generated` others."""
    decoder = work.decoder
    attention = 4.0 * decoder.attention_width * work.visible_keys(generated) + decoder.state_operations((1,) * decoder.layers)
    return Operations(2.0 * (decoder.parameters + decoder.head), attention)


def _vision(work: Workload, module: Module) -> Stage:
    tower = work.tower
    # Upper bound on elements read and written per patch, if every product and elementwise pass goes to memory, as in _prefill.
    # Queries, keys and values are as wide as the hidden state; the MLP has two matrices.
    passes = sum(tower.blocks) * (20.0 * tower.hidden + 4.0 * tower.mlp) * work.precision.number
    moved = Interval(work.tower_bytes, work.tower_bytes + passes)
    return _stage("vision encoder", work, module, tower.work, moved, tower.layers * _KERNELS)


def _selection(work: Workload, module: Module) -> Stage:
    tokens, hidden = work.tower.tokens, work.decoder.hidden
    moved = float(tokens * (hidden + tokens) * work.precision.number)
    # All pairs of tokens are compared; few methods need more. Launches of many small nodes dominate.
    return _stage("selection", work, module, Operations(0.0, 2.0 * tokens**2 * hidden), Interval(moved, moved), work.selector)


def _prefill(work: Workload, module: Module) -> Stage:
    decoder = work.decoder
    tokens = [alive + work.text_tokens for alive in work.alive]
    # Upper bound if no data stays in a cache between kernels: four products and attention read inputs and write outputs; two norms
    # with their residual sums and the MLP's product of gate and up add one pass each.
    attention = 4 * decoder.attention_width + 2 * decoder.kv_width
    passes = float(sum(tokens) * (12 * decoder.hidden + attention + 6 * decoder.intermediate) * work.precision.number)
    weights = work.layer_bytes + work.head_bytes
    return _stage("prefill", work, module, prefill_operations(work), Interval(weights, weights + passes), decoder.layers * _KERNELS)


def _decode(work: Workload, module: Module) -> Stage:
    decoder, half = work.decoder, work.generated / 2  # the mean over the answer
    constant = work.layer_bytes + work.head_bytes + 2.0 * decoder.state_bytes  # states are read and written
    # Our graphs read the keys beyond a window too, and mask them.
    needed = work.visible_keys(half) * decoder.kv_width * work.precision.number
    moved = Interval(constant + needed, constant + work.kv_bytes(half))
    return _stage("decode", work, module, decode_operations(work, half), moved, decoder.layers * _KERNELS)


def _stage(name: str, work: Workload, module: Module, operations: Operations, moved: Interval, kernels: int) -> Stage:
    in_decoder, between = name in ("prefill", "decode"), work.precision.elsewhere
    arithmetic = work.precision.arithmetic if in_decoder else work.precision.in_vision
    unpacked = work.precision.unpacked and in_decoder
    peak = module.tflops(arithmetic)
    share = _UNPACKED[module.sm] if unpacked else _COMPUTE[module.sm, arithmetic]
    compute = _compute_ms(operations.products, peak, share)
    compute += _compute_ms(operations.attention, module.tflops(between), share if unpacked else _COMPUTE[module.sm, between])
    width = module.bandwidth * 1e6  # bytes per millisecond
    memory = Interval(moved.low / (width * _BANDWIDTH.high), moved.high / (width * _BANDWIDTH.low))
    launches = Interval(kernels * _LAUNCH_MS.low, kernels * _LAUNCH_MS.high)
    ms = Interval(max(compute.low, memory.low), max(compute.high, memory.high)) + launches
    costs = {"compute": compute.middle, "bandwidth": memory.middle, "launches": launches.middle}
    return Stage(name, operations.total, moved, ms, max(costs, key=costs.__getitem__))


def _compute_ms(operations: float, tflops: float, share: Interval) -> Interval:
    return Interval(operations / (tflops * 1e9 * share.high), operations / (tflops * 1e9 * share.low))


def _memory(work: Workload, module: Module) -> MemoryEstimate:
    tower, decoder = work.tower, work.decoder
    parts = {
        "vision encoder": work.tower_bytes,
        "decoder layers": work.layer_bytes,
        "output head": work.head_bytes,
    }
    # Live at once: the residual, a norm's output, and inputs and outputs of a layer's widest kernel.
    widest = max(decoder.attention_width + decoder.kv_width, 2 * decoder.intermediate)
    prefill = (max(work.alive) + work.text_tokens) * (2 * decoder.hidden + widest)
    vision = tower.patches * (2 * tower.hidden + max(4 * tower.hidden, 2 * tower.mlp))
    activations = float(max(prefill, vision) * work.precision.number)
    kv = work.kv_bytes(work.generated) + decoder.state_bytes
    files = sum(parts.values()) + work.embedding_bytes
    return MemoryEstimate(parts, work.embedding_bytes, kv, activations, RUNTIME_BYTES, files, _SYSTEM_BYTES, module.ram_bytes)
