"""What computes, as the generation loop sees it: one interface for all backends, and a proxy for what stands in front of one.

An answer may be ended from any thread. That is heard between two steps, and inside one where the backend can stop.
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


class Cancelled(Exception):
    """A computation stopped because its answer is to end. It never leaves the runtime."""


class CancellationToken:
    """Whether an answer is to end, and why: `reason` is CANCELLED, DEADLINE or None. The first reason counts."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._stops: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def cancel(self, reason: str) -> None:
        """Ask for the end."""
        with self._lock:
            self.reason = self.reason or reason
            stops = list(self._stops)
        for stop in stops:
            stop()

    def raise_if_cancelled(self) -> None:
        """Raise Cancelled if the end was asked for."""
        if self.reason is not None:
            raise Cancelled

    @contextmanager
    def on_cancel(self, stop: Callable[[], None]) -> Iterator[None]:
        """Have `stop` called when the end is asked for while the block runs, or at once if it was before."""
        with self._lock:
            self._stops.append(stop)
            fired = self.reason is not None
        if fired:
            stop()
        try:
            yield
        finally:
            with self._lock:
                self._stops.remove(stop)

    @contextmanager
    def deadline(self, seconds: float | None) -> Iterator[None]:
        """Fire DEADLINE when so many seconds have passed and the block still runs; None is never."""
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
    """What the vision encoder says of an image: visual tokens `embeds` [1, V, hidden] and `signals` for input methods that need
    them. `kept` of every vision cut: indices in the image [V], ascending; of the last one those of the tokens.
    """

    embeds: np.ndarray
    signals: Mapping[str, np.ndarray] = field(default_factory=dict)
    kept: tuple[np.ndarray, ...] = ()

    @property
    def token_indices(self) -> np.ndarray:
        """Indices in the image [V] of the visual tokens."""
        return self.kept[-1] if self.kept else np.arange(self.embeds.shape[1])


@dataclass(frozen=True)
class DecoderOutput:
    """One forward: `logits` [vocabulary] of the last token; `new_kv` [n, kv heads, head_dim] that the caches are to take in, of the
    prefix, of the visual tokens that stay and of the suffix; `kept` of every layer and cache cut; `attention_shares` [layers, 4] of
    a plan whose rate follows attention, else None. `graph_ms`: of the graph alone; None where it goes on after the call.
    """

    logits: np.ndarray
    new_kv: KvArrays
    kept: tuple[np.ndarray, ...]
    attention_shares: np.ndarray | None
    graph_ms: float | None = None


class Backend(Protocol):
    """The model as the generation loop sees it."""

    def encode_image(
        self, patches: np.ndarray, *, unpruned: bool = False, cancellation: CancellationToken | None = None
    ) -> VisionOutput:
        """Return what the vision encoder says of patches [patches, patch pixels]; `unpruned`: of all, whatever its cuts are.

        `cancellation`: what may end it early, with Cancelled, where the engine can stop.
        """
        ...

    def select_tokens(self, vision_output: VisionOutput, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Apply a plan's input cut, given the embeddings of the prompt [1, M, hidden]: return embeddings [1, K, hidden], indices
        [K]. `tier`: the number of the plan.
        """
        ...

    def embed_tokens(self, ids: Sequence[int]) -> np.ndarray:
        """Return embeddings [1, n, hidden]."""
        ...

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Run new tokens on top of a cache. `cancellation`: as of `encode_image`."""
        ...

    def predict_keep_ratio(self, split: np.ndarray, step: int) -> float:
        """Return the share of visual tokens that the plan's predictor keeps for decode step `step`, given the attention split."""
        ...


class BackendProxy:
    """A backend that hands everything on to another one. What stands in front of a backend overrides what it changes."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def encode_image(
        self, patches: np.ndarray, *, unpruned: bool = False, cancellation: CancellationToken | None = None
    ) -> VisionOutput:
        """Have the backend look at patches."""
        return self._backend.encode_image(patches, unpruned=unpruned, cancellation=cancellation)

    def select_tokens(self, vision_output: VisionOutput, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Have the backend apply a plan's input cut."""
        return self._backend.select_tokens(vision_output, prompt, tier)

    def embed_tokens(self, ids: Sequence[int]) -> np.ndarray:
        """Have the backend embed tokens."""
        return self._backend.embed_tokens(ids)

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Have the backend run new tokens on top of a cache."""
        return self._backend.forward(tokens, cache, cancellation=cancellation)

    def predict_keep_ratio(self, split: np.ndarray, step: int) -> float:
        """Have the backend's predictor say what share of visual tokens decode step `step` keeps."""
        return self._backend.predict_keep_ratio(split, step)
