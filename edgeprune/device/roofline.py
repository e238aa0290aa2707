"""What an answer costs on a module at best and at worst: operations over compute, bytes over bandwidth (Williams et al. 2009).

A stage takes the larger of both, since an engine overlaps them, and the launches of its kernels. Every time is a range, because
how much of a peak an engine reaches is known only roughly; docs/roofline.md compares the midpoints with published measurements.
Not counted: reading and resizing the picture, tokenizing, sampling, and clocks that fall in heat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeprune.device.jetson import Module
from edgeprune.device.workload import Workload


@dataclass(frozen=True)
class Interval:
    """The lower and the upper figure."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """Their mean."""
        return (self.low + self.high) / 2

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)


# Shares of the peaks that engines reach. Orin's FP16 was set by the published prefill and vision times of Qwen3-VL
# (docs/roofline.md). No published row is limited by FP32 or by Thor's FP16, which are taken as the same, nor by narrower numbers,
# whose lower end is that of products too small for wider units.
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
# The same where integers are unpacked to FP16 on the way. Published INT4 prefill reaches 0.09 on Thor, whose kernels are Orin's;
# the upper end leaves room for better ones.
_UNPACKED = {(8, 7): Interval(0.38, 0.54), (11, 0): Interval(0.08, 0.2)}
_BANDWIDTH = Interval(0.75, 0.95)  # set by the published decode rates
_LAUNCH_MS = Interval(0.001, 0.006)  # between two kernels, captured in a CUDA graph or not: set by the same rates of small models
_KERNELS = 12  # of one transformer layer in an engine: products, attention, rotation, norms, cache
_RUNTIME_BYTES = Interval(
    1.0e9, 2.0e9
)  # CUDA context, libraries, workspaces: published memory of Orin Nano and NX less the weights


@dataclass(frozen=True)
class Operations:
    """Operations of a stage: of `products` with weights, and of `attention` between tokens, in floating point throughout."""

    products: float
    attention: float

    @property
    def total(self) -> float:
        """Both."""
        return self.products + self.attention


@dataclass(frozen=True)
class Peaks:
    """What a machine was measured to reach: `operations` a second by arithmetic ("fp32", "fp16", "int8"), `bandwidth` in bytes a
    second, both with `threads` threads (None: all).
    """

    operations: Mapping[str, float]
    bandwidth: float
    threads: int | None

    def least_ms(self, work: Operations, arithmetic: str, moved: float) -> float:
        """Return the milliseconds that a stage takes at least: all operations at their peaks, or all bytes at the bandwidth."""
        between = "fp32" if arithmetic == "int8" else arithmetic
        compute = work.products / self.operations[arithmetic] + work.attention / self.operations[between]
        return 1e3 * max(compute, moved / self.bandwidth)


@dataclass(frozen=True)
class Stage:
    """One stage: its operations, the bytes it moves at least and at most, its milliseconds, and what limits it at the midpoint.

    `limit` is "compute", "bandwidth" or "launches".
    """

    name: str
    operations: float
    bytes: Interval
    ms: Interval
    limit: str


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the module, where CPU and GPU share memory. The system's own memory is not counted.

    `file_cache`: pages of the weights' files, just read; the system gives them back when it needs them.
    """

    weights: float
    kv: float
    activations: float
    runtime: Interval
    file_cache: float
    ram: int

    @property
    def at_rest(self) -> Interval:
        """Loaded and idle."""
        return Interval(self.weights, self.weights) + self.runtime

    @property
    def at_peak(self) -> Interval:
        """With the whole answer's KV cache and the largest activations; the file cache is not in it."""
        extra = self.kv + self.activations
        return self.at_rest + Interval(extra, extra)

    @property
    def fits(self) -> str:
        """Whether the peak is below the module's memory: "yes", "no", or "perhaps" where the range is on both sides."""
        if self.at_peak.high < self.ram:
            return "yes"
        return "perhaps" if self.at_peak.low < self.ram else "no"


@dataclass(frozen=True)
class Estimate:
    """The stages of an answer in order, the last being one token of decode, and the memory."""

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
        """Return a stage by name, None where the workload has no such stage."""
        return next((stage for stage in self.stages if stage.name == name), None)


def estimate(work: Workload, module: Module) -> Estimate:
    """Return what a workload costs on a module; raise UsageError when the module lacks its arithmetic."""
    selection = (_selection(work, module),) if work.selector else ()
    stages = (_vision(work, module), *selection, _prefill(work, module), _decode(work, module))
    return Estimate(stages, _memory(work, module))


def vision_operations(work: Workload) -> Operations:
    """Return what the vision encoder multiplies for one image, its attention taken to be over the whole of it."""
    tower, blocks = work.tower, work.tower.blocks
    if not sum(blocks):  # a question without a picture
        return Operations(0.0, 0.0)
    tokens = tower.tokens * blocks[-1] // tower.patches
    products = 2.0 * (tower.parameters * sum(blocks) / len(blocks) + tower.merger * tokens)
    return Operations(products, 4.0 * tower.hidden * sum(patches**2 for patches in blocks))


def prefill_operations(work: Workload) -> Operations:
    """Return what the decoder multiplies up to the first token, with the visual tokens that are alive in each layer."""
    decoder = work.decoder
    tokens = [alive + work.text_tokens for alive in work.alive]
    each = decoder.parameters / decoder.layers
    causal = 2.0 * decoder.attention_width  # two products for each pair of tokens, half of the pairs
    # The head sees the last token alone.
    return Operations(2.0 * decoder.head + sum(2.0 * each * n for n in tokens), sum(causal * n * n for n in tokens))


def _vision(work: Workload, module: Module) -> Stage:
    tower = work.tower
    # Numbers read and written for one patch where every product and every pass between goes to memory, as in _prefill; queries,
    # keys and values are as wide as the hidden state, and the MLP has two matrices.
    passes = sum(tower.blocks) * (20.0 * tower.hidden + 4.0 * tower.mlp) * work.precision.number
    moved = Interval(work.tower_bytes, work.tower_bytes + passes)
    return _stage("vision encoder", work, module, vision_operations(work).total, moved, tower.layers * _KERNELS)


def _selection(work: Workload, module: Module) -> Stage:
    tokens, hidden = work.tower.tokens, work.decoder.hidden
    moved = float(tokens * (hidden + tokens) * work.precision.number)
    # All pairs of tokens compared, which few methods exceed; the chain of small nodes is what costs.
    return _stage("selection", work, module, 2.0 * tokens**2 * hidden, Interval(moved, moved), work.selector)


def _prefill(work: Workload, module: Module) -> Stage:
    decoder = work.decoder
    tokens = [alive + work.text_tokens for alive in work.alive]
    # Where nothing stays in a cache between kernels: four products and attention read their inputs and write their outputs, two
    # norms with their sums and the MLP's product of gate and up pass once more.
    attention = 4 * decoder.attention_width + 2 * decoder.kv_width
    passes = float(sum(tokens) * (12 * decoder.hidden + attention + 6 * decoder.intermediate) * work.precision.number)
    weights = work.layer_bytes + work.head_bytes
    return _stage(
        "prefill", work, module, prefill_operations(work).total, Interval(weights, weights + passes), decoder.layers * _KERNELS
    )


def _decode(work: Workload, module: Module) -> Stage:
    decoder = work.decoder
    kv = work.kv_bytes(work.generated / 2)  # the mean over the answer
    cached = kv / (decoder.kv_width * work.precision.number)  # tokens, summed over the layers
    operations = 2.0 * (decoder.parameters + decoder.head) + 4.0 * decoder.attention_width * cached
    moved = work.layer_bytes + work.head_bytes + kv
    return _stage("decode", work, module, operations, Interval(moved, moved), decoder.layers * _KERNELS)


def _stage(name: str, work: Workload, module: Module, operations: float, moved: Interval, kernels: int) -> Stage:
    inside = name in ("prefill", "decode")
    arithmetic = work.precision.arithmetic if inside else work.precision.elsewhere
    peak, width = module.tflops(arithmetic) * 1e9, module.bandwidth * 1e6  # in a millisecond
    share = _UNPACKED[module.sm] if inside and work.precision.unpacked else _COMPUTE[module.sm, arithmetic]
    compute = Interval(operations / (peak * share.high), operations / (peak * share.low))
    memory = Interval(moved.low / (width * _BANDWIDTH.high), moved.high / (width * _BANDWIDTH.low))
    launches = Interval(kernels * _LAUNCH_MS.low, kernels * _LAUNCH_MS.high)
    ms = Interval(max(compute.low, memory.low), max(compute.high, memory.high)) + launches
    costs = {"compute": compute.middle, "bandwidth": memory.middle, "launches": launches.middle}
    return Stage(name, operations, moved, ms, max(costs, key=costs.__getitem__))


def _memory(work: Workload, module: Module) -> MemoryEstimate:
    tower, decoder = work.tower, work.decoder
    weights = work.layer_bytes + work.head_bytes + work.embedding_bytes + work.tower_bytes
    # Alive at once: the residual, a norm's output, and what the widest kernel of a layer reads and writes.
    widest = max(decoder.attention_width + decoder.kv_width, 2 * decoder.intermediate)
    prefill = (max(work.alive) + work.text_tokens) * (2 * decoder.hidden + widest)
    vision = tower.patches * (2 * tower.hidden + max(4 * tower.hidden, 2 * tower.mlp))
    activations = float(max(prefill, vision) * work.precision.number)
    return MemoryEstimate(weights, work.kv_bytes(work.generated), activations, _RUNTIME_BYTES, weights, module.ram_bytes)
