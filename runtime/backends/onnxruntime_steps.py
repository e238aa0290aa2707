"""Forward passes of ONNX Runtime: in general, and decode steps whose inputs and outputs stay bound to their memory.

A step of one token reads the buffers of `step_buffers` and writes its row into them. Everything else that the graph takes is as
before: feeding some hundred arrays anew takes 0.7 ms (30 layers), which is 6 % of such a step of SmolVLM-256M's shape. Steps of
several conversations are the rows of one pass, on the buffers of `step_slots`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import onnxruntime

from edgeprune.bundle import Bundle
from edgeprune.bundle.graph_io import (
    LENGTHS,
    buffer_name,
    cache_slots,
    decoder_inputs,
    grown_name,
    kept_names,
    rows_name,
    scale_name,
)
from edgeprune.runtime.backends.interface import CancellationToken, Cancelled, DecoderOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvArrays, KvBlock, KvCache, TokenSegment, decoder_feeds
from edgeprune.runtime.backends.step_buffers import StepBuffers
from edgeprune.runtime.backends.step_slots import StepSlots

# What holds where the entry is missing. Looking for it in vain takes 0.08 ms, for an exception (ONNX Runtime 1.31).
_NO_GRAPH = ("gpu_graph_id", "0")
_SHRINK = ("memory.enable_memory_arena_shrinkage", "cpu:0")


def run(
    session: Any,
    names: Sequence[str],
    feeds: Mapping[str, np.ndarray],
    cancellation: CancellationToken | None,
    *,
    shrink: bool = False,
) -> list[np.ndarray]:
    """Run a session and return the outputs with the given names. Raises Cancelled.

    `shrink`: return the memory that the run took to the system. The session needs an arena on the CPU for it.
    """
    entries = [_SHRINK] if shrink else []
    outputs: list[np.ndarray] = _stoppable(partial(session.run, names, feeds), cancellation, *entries)
    return outputs


def _stoppable(call: Any, cancellation: CancellationToken | None, *entries: tuple[str, str]) -> Any:
    # ONNX Runtime checks `terminate` between two nodes.
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4  # cancellation is not worth a log line, and errors are raised
    for entry in (_NO_GRAPH, *entries):
        options.add_run_config_entry(*entry)
    with cancellation.on_cancel(partial(setattr, options, "terminate", True)) if cancellation else nullcontext():
        try:
            return call(options)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            if cancellation is not None and cancellation.reason is not None:
                raise Cancelled from error
            raise


def empty_buffers(session: Any) -> dict[str, np.ndarray]:
    """Return the buffers of a decoder as passes of several tokens take them, or nothing if it has none."""
    nodes = {node.name: node for node in session.get_inputs()}
    if LENGTHS not in nodes:
        return {}
    stems, scales = (tuple(name(0, part).removesuffix("0") for part in ("key", "value")) for name in (buffer_name, scale_name))
    buffers = {
        name: np.zeros((1, node.shape[1], 1, node.shape[3]), np.int8 if _is_quantized(node) else np.float32)
        for name, node in nodes.items()
        if name.startswith(stems)
    }
    ones = {name: np.ones(node.shape, np.float32) for name, node in nodes.items() if name.startswith(scales)}
    return {**buffers, **ones, LENGTHS: np.zeros(len(buffers) // 2, np.int32)}


def reads_8_bits(session: Any) -> bool:
    """Return whether the buffers of a decoder that has them are of 8 bits."""
    return any(map(_is_quantized, session.get_inputs()))


def takes_several(session: Any) -> bool:
    """Return whether a decoder takes steps of several conversations at once. In 8 bits each would need scales of its own."""
    counts = [node.shape for node in session.get_inputs() if node.name == LENGTHS]
    return bool(counts) and not isinstance(counts[0][0], int) and not reads_8_bits(session)


def _is_quantized(node: Any) -> bool:
    return bool(node.type == "tensor(int8)")


class _Binding:
    # The inputs and outputs of the steps of `count` conversations. `embeds` [1, count, width], `positions` [axes, count] and
    # `lengths` [layers, count] are to be filled before each run, `logits` [1, count, vocabulary] and `rows` [arrays, count, kv
    # heads, head_dim] are filled by it. In 8 bits the graph gives the rows as they are; otherwise they are those of the buffers.
    def __init__(self, session: Any, bundle: Bundle, count: int = 1) -> None:
        self._session, self._binding, shape = session, session.io_binding(), bundle.manifest.decoder
        self._slots = cache_slots(bundle.plan)
        taken = {node.name for node in session.get_inputs()}
        self._bound = KvBlock()
        empty = TokenSegment(np.zeros((1, 0, shape.width), np.float32), np.zeros((shape.position_axes, 0), np.int64))
        tokens = TokenSegment(np.zeros((1, count, shape.width), np.float32), np.zeros((shape.position_axes, count), np.int64))
        self.embeds, self.positions = tokens.embeds, tokens.positions
        # The rows are in the buffers, so the caches that other passes read are empty.
        nothing = DecoderInput(empty, empty, tokens, np.zeros(0, np.int64), np.zeros((count, 3), np.float32))
        names = decoder_inputs(bundle.plan, tiers=bool(bundle.lower_tiers))
        for name, array in decoder_feeds(names, nothing, KvCache.empty(shape, bundle.plan)).items():
            if name in taken:
                self._binding.bind_ortvalue_input(name, _value(array))
        lengths = np.zeros(len(self._slots) // 2 * count, np.int32)
        self.lengths = lengths.reshape(-1, count)
        self._binding.bind_ortvalue_input(LENGTHS, _value(lengths))
        outputs = {node.name: node for node in session.get_outputs()}
        self.logits = np.zeros((1, count, outputs["logits"].shape[2]), np.float32)
        self._binding.bind_ortvalue_output("logits", _value(self.logits))
        self.rows = np.zeros((len(self._slots), count, shape.kv_heads, shape.head_dim), shape.cache_type)
        self._given = reads_8_bits(session)
        for slot, rows in zip(self._slots, self.rows if self._given else (), strict=self._given):
            self._binding.bind_ortvalue_output(rows_name(*slot), _value(rows))
        # Cuts keep none of no visual tokens.
        cuts = kept_names(bundle.plan, "layer", "cache")
        self._kept = tuple(
            np.zeros([size if isinstance(size, int) else 0 for size in outputs[cut].shape], np.int64) for cut in cuts
        )

    def bind_buffers(self, arrays: KvBlock, scales: KvArrays = ()) -> None:
        """Have the steps read and extend these buffers [count, kv heads, capacity, head_dim] in place."""
        if self._bound is arrays:
            return
        for slot, array in zip(self._slots, arrays, strict=True):
            value = _value(array)
            self._binding.bind_ortvalue_input(buffer_name(*slot), value)
            self._binding.bind_ortvalue_output(grown_name(*slot), value)
        for slot, scale in zip(self._slots, scales, strict=False):  # without scales there is nothing to bind
            self._binding.bind_ortvalue_input(scale_name(*slot), _value(scale))
        self._bound = arrays

    def run(self, cancellation: CancellationToken | None = None) -> float:
        """Run the steps; return how many milliseconds the graph took."""
        started = time.perf_counter()
        _stoppable(partial(self._session.run_with_iobinding, self._binding), cancellation)
        run_ms = 1e3 * (time.perf_counter() - started)
        if not self._given:
            arrays, numbers = np.ogrid[: len(self.rows), : self.rows.shape[1]]
            self.rows[:] = self._bound.block[arrays, numbers, :, self.lengths.repeat(2, axis=0)]
        return run_ms

    def output(self, number: int, run_ms: float) -> DecoderOutput:
        """Return what the last run gave the conversation of this number."""
        rows = KvBlock.of(self.rows[:, number : number + 1].copy())
        return DecoderOutput(self.logits[0, number].copy(), rows, self._kept, None, run_ms)


class BoundStep:
    """The decode steps of one conversation."""

    def __init__(self, session: Any, bundle: Bundle) -> None:
        self._binding, self._quantized = _Binding(session, bundle), reads_8_bits(session)
        self._buffers = StepBuffers(len(cache_slots(bundle.plan)) // 2, quantized=self._quantized)

    def forward(self, tokens: DecoderInput, cache: KvCache, cancellation: CancellationToken | None) -> DecoderOutput:
        """Run the step of one token."""
        binding, buffers = self._binding, self._buffers
        buffers.follow(cache)
        binding.bind_buffers(buffers.arrays, buffers.scales)
        binding.embeds[:], binding.positions[:] = tokens.suffix.embeds, tokens.suffix.positions
        binding.lengths[:, 0] = buffers.lengths
        run_ms = binding.run(cancellation)
        buffers.stepped()
        if self._quantized and not buffers.fits(binding.rows.reshape(len(binding.rows), -1)):
            buffers.forget()
        return binding.output(0, run_ms)


class BoundSteps:
    """The decode steps of up to `count` conversations, which are the rows of one pass."""

    def __init__(self, session: Any, bundle: Bundle, count: int) -> None:
        self._session, self._bundle, shape = session, bundle, bundle.manifest.decoder
        self._slots = StepSlots(count, len(cache_slots(bundle.plan)) // 2)
        self._embeds = np.zeros((1, count, shape.width), np.float32)
        self._positions = np.zeros((shape.position_axes, count), np.int64)
        self._bindings: dict[tuple[int, int], _Binding] = {}  # for the slots from the first to before the second
        self._arrays = KvBlock()

    def forward(self, steps: Sequence[tuple[DecoderInput, KvCache]]) -> list[DecoderOutput | None]:
        """Run steps of one token, each of another conversation; None for those that find no slot."""
        numbers = self._slots.place([cache for _, cache in steps])
        placed = [number for number in numbers if number is not None]
        if not placed:
            return [None] * len(steps)
        for number, (tokens, _) in zip(numbers, steps, strict=True):
            if number is not None:
                self._embeds[:, number], self._positions[:, number] = tokens.suffix.embeds[:, 0], tokens.suffix.positions[:, 0]
        first, end = min(placed), max(placed) + 1
        binding = self._binding(first, end)
        # A slot between them that takes no part repeats its last step, whose row is not valid yet.
        binding.embeds[:], binding.positions[:] = self._embeds[:, first:end], self._positions[:, first:end]
        for number in range(first, end):
            binding.lengths[:, number - first] = self._slots.buffers[number].lengths
        run_ms = binding.run()
        for number in range(first, end):
            buffers = self._slots.buffers[number]
            buffers.stepped() if number in placed else buffers.disturbed()
        return [None if number is None else binding.output(number - first, run_ms) for number in numbers]

    def _binding(self, first: int, end: int) -> _Binding:
        arrays = self._slots.arrays
        if arrays is not self._arrays:  # bindings hold the memory that they are bound to
            self._bindings.clear()
            self._arrays = arrays
        if (first, end) not in self._bindings:
            binding = self._bindings[first, end] = _Binding(self._session, self._bundle, end - first)
            binding.bind_buffers(KvBlock.of(arrays.block[:, first:end]))
        return self._bindings[first, end]


def _value(array: np.ndarray) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
