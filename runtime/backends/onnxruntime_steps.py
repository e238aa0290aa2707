"""Forward passes of ONNX Runtime: in general, and decode steps whose inputs and outputs stay bound to their memory.

A step of one token reads the buffers of `step_buffers` and writes its row into them. Everything else that the graph takes is as
before: feeding some hundred arrays anew takes 0.7 ms (30 layers), which is 6 % of such a step of SmolVLM-256M's shape.
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
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvArrays, KvCache, TokenSegment, decoder_feeds
from edgeprune.runtime.backends.step_buffers import StepBuffers


def run(
    session: Any, names: Sequence[str], feeds: Mapping[str, np.ndarray], cancellation: CancellationToken | None
) -> list[np.ndarray]:
    """Run a session and return the outputs with the given names. Raises Cancelled."""
    outputs: list[np.ndarray] = _stoppable(partial(session.run, names, feeds), cancellation)
    return outputs


def _stoppable(call: Any, cancellation: CancellationToken | None) -> Any:
    # ONNX Runtime checks `terminate` between two nodes.
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4  # cancellation is not worth a log line, and errors are raised
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
    return {**buffers, **ones, LENGTHS: np.zeros(nodes[LENGTHS].shape, np.int32)}


def _is_quantized(node: Any) -> bool:
    return bool(node.type == "tensor(int8)")


class BoundStep:
    """The decode steps of one conversation."""

    def __init__(self, session: Any, bundle: Bundle) -> None:
        self._session, self._binding, shape = session, session.io_binding(), bundle.manifest.decoder
        self._slots = cache_slots(bundle.plan)
        taken = {node.name: node for node in session.get_inputs()}
        self._quantized = _is_quantized(taken[buffer_name(*self._slots[0])])
        self._buffers = StepBuffers(len(self._slots) // 2, quantized=self._quantized)
        self._bound: KvArrays = ()
        empty = TokenSegment(np.zeros((1, 0, shape.width), np.float32), np.zeros((shape.position_axes, 0), np.int64))
        self._token = TokenSegment(np.zeros((1, 1, shape.width), np.float32), np.zeros((shape.position_axes, 1), np.int64))
        # The rows are in the buffers, so the caches that other passes read are empty.
        nothing = DecoderInput(empty, empty, self._token, np.zeros(0, np.int64), np.zeros((1, 3), np.float32))
        names = decoder_inputs(bundle.plan, tiers=bool(bundle.lower_tiers))
        for name, array in decoder_feeds(names, nothing, KvCache.empty(shape, bundle.plan)).items():
            if name in taken:
                self._binding.bind_ortvalue_input(name, _value(array))
        self._binding.bind_ortvalue_input(LENGTHS, _value(self._buffers.lengths))
        outputs = {node.name: node for node in session.get_outputs()}
        self._logits = np.zeros((1, 1, outputs["logits"].shape[2]), np.float32)
        self._binding.bind_ortvalue_output("logits", _value(self._logits))
        self._all_rows = np.zeros((len(self._slots), 1, shape.kv_heads, shape.head_dim), shape.cache_type)
        self._rows = tuple(self._all_rows)
        for slot, rows in zip(self._slots, self._rows, strict=True):
            self._binding.bind_ortvalue_output(rows_name(*slot), _value(rows))
        # Cuts keep none of no visual tokens.
        cuts = kept_names(bundle.plan, "layer", "cache")
        self._kept = tuple(
            np.zeros([size if isinstance(size, int) else 0 for size in outputs[cut].shape], np.int64) for cut in cuts
        )

    def forward(self, tokens: DecoderInput, cache: KvCache, cancellation: CancellationToken | None) -> DecoderOutput:
        """Run the step of one token."""
        self._buffers.follow(cache)
        if self._bound is not self._buffers.arrays:
            self._bind_buffers()
        self._token.embeds[:], self._token.positions[:] = tokens.suffix.embeds, tokens.suffix.positions
        started = time.perf_counter()
        _stoppable(partial(self._session.run_with_iobinding, self._binding), cancellation)
        run_ms = 1e3 * (time.perf_counter() - started)
        self._buffers.stepped()
        if self._quantized and not self._buffers.fits(self._all_rows.reshape(len(self._slots), -1)):
            self._buffers.forget()
        return DecoderOutput(self._logits[0, 0].copy(), tuple(rows.copy() for rows in self._rows), self._kept, None, run_ms)

    def _bind_buffers(self) -> None:
        for slot, array in zip(self._slots, self._buffers.arrays, strict=True):
            value = _value(array)
            self._binding.bind_ortvalue_input(buffer_name(*slot), value)
            self._binding.bind_ortvalue_output(grown_name(*slot), value)
        for slot, scale in zip(self._slots, self._buffers.scales, strict=False):  # without scales there is nothing to bind
            self._binding.bind_ortvalue_input(scale_name(*slot), _value(scale))
        self._bound = self._buffers.arrays


def _value(array: np.ndarray) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
