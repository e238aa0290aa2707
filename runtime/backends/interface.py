"""The interface of all backends, a proxy for wrapping one, and cancellation.

Any thread may cancel a request. Cancellation takes effect between two forward passes, or within one if the backend can stop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from edgeprune.runtime.backends.kv_cache import DecoderInput, KvArrays, KvCache

CANCELLED, DEADLINE = "cancelled", "deadline"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"  # ONNX Runtime's names of its execution providers


class Cancelled(Exception):
    """Raised when a computation stops because its request was cancelled. It never leaves the runtime."""


class CancellationToken:
    """The cancellation state of a request. `reason`: CANCELLED, DEADLINE or None; the first reason wins. Thread-safe."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._stops: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def cancel(self, reason: str) -> None:
        """Cancel the request and call the registered callbacks."""
        with self._lock:
            self.reason = self.reason or reason
            stops = list(self._stops)
        for stop in stops:
            stop()

    def raise_if_cancelled(self) -> None:
        """Raise Cancelled if the request was cancelled."""
        if self.reason is not None:
            raise Cancelled

    @contextmanager
    def on_cancel(self, stop: Callable[[], None]) -> Iterator[None]:
        """Call `stop` when the request is cancelled while the block runs, or at once if it already was."""
        with self._lock:
            self._stops.append(stop)
            cancelled = self.reason is not None
        if cancelled:
            stop()
        try:
            yield
        finally:
            with self._lock:
                self._stops.remove(stop)

    @contextmanager
    def deadline(self, seconds: float | None) -> Iterator[None]:
        """Cancel with DEADLINE if the block still runs after `seconds`; None means no deadline."""
        if seconds is None:
            yield
            return
        timer = threading.Timer(min(max(seconds, 0.0), threading.TIMEOUT_MAX), self.cancel, (DEADLINE,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


@dataclass(frozen=True)
class VisionOutput:
    """Output of the vision encoder for one image.

    `embeds` [1, V, hidden]: visual tokens. `signals`: inputs of input-cut methods that need them. `kept`: for every vision cut the
    ascending indices [V] in the image; the last entry belongs to `embeds`.
    """

    embeds: np.ndarray
    signals: Mapping[str, np.ndarray] = field(default_factory=dict)
    kept: tuple[np.ndarray, ...] = ()

    @property
    def token_indices(self) -> np.ndarray:
        """Indices [V] of the visual tokens in the image."""
        return self.kept[-1] if self.kept else np.arange(self.embeds.shape[1])


@dataclass(frozen=True)
class DecoderOutput:
    """Output of one forward pass of the decoder.

    `logits` [vocabulary]: for the last token. `new_kv` [n, kv heads, head_dim]: rows for the KV cache, in the order prefix, kept
    visual tokens, suffix. `kept`: indices for every layer and cache cut. `attention_shares` [layers, 4]: for plans whose decode
    cut follows attention, else None. `graph_ms`: time of the graph alone, None if it continues after the call. `states`: of the
    layers without attention, after these tokens. `launched`: how a step was put on the device, "graph" (one launch of a captured
    CUDA graph) or "by hand"; "" where there is no choice. Of a step that wrote its rows into the cache already, `new_kv` is empty.
    """

    logits: np.ndarray
    new_kv: KvArrays
    kept: tuple[np.ndarray, ...]
    attention_shares: np.ndarray | None
    graph_ms: float | None = None
    states: tuple[np.ndarray, ...] = ()
    launched: str = ""


class Backend(Protocol):
    """The graphs of a bundle, as the generation loop calls them."""

    def encode_image(
        self, patches: np.ndarray, *, unpruned: bool = False, cancellation: CancellationToken | None = None
    ) -> VisionOutput:
        """Run the vision encoder on patches [patches, patch pixels]. `unpruned`: ignore its vision cuts.

        `cancellation`: raises Cancelled early if the backend can stop.
        """
        ...

    def select_tokens(self, vision_output: VisionOutput, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, ...]:
        """Apply the input cut of a tier, given prompt embeddings [1, M, hidden]; return embeddings [1, K, hidden] and indices [K].

        `tier`: index of the plan. If it weighs, the logarithms of how many tokens each kept one stands for [K] are the third.
        """
        ...

    def embed_tokens(self, ids: Sequence[int]) -> np.ndarray:
        """Return the embeddings [1, n, hidden] of n token ids."""
        ...

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Run the decoder on new tokens and a KV cache. `cancellation`: as for `encode_image`."""
        ...

    def predict_keep_ratio(self, split: np.ndarray, step: int) -> float:
        """Return the keep ratio for decode step `step` from the plan's predictor. `split` [layers, 4]: attention shares."""
        ...


class BackendProxy:
    """A backend that forwards every call to another one. Subclasses override the calls that they change."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def encode_image(
        self, patches: np.ndarray, *, unpruned: bool = False, cancellation: CancellationToken | None = None
    ) -> VisionOutput:
        """Call the wrapped backend."""
        return self._backend.encode_image(patches, unpruned=unpruned, cancellation=cancellation)

    def select_tokens(self, vision_output: VisionOutput, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, ...]:
        """Call the wrapped backend."""
        return self._backend.select_tokens(vision_output, prompt, tier)

    def embed_tokens(self, ids: Sequence[int]) -> np.ndarray:
        """Call the wrapped backend."""
        return self._backend.embed_tokens(ids)

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Call the wrapped backend."""
        return self._backend.forward(tokens, cache, cancellation=cancellation)

    def predict_keep_ratio(self, split: np.ndarray, step: int) -> float:
        """Call the wrapped backend."""
        return self._backend.predict_keep_ratio(split, step)
