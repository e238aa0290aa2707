"""One engine for many threads: whoever came first is served first, one graph at a time.

Answers that are generated at once take turns step by step. On one device two steps beside each other are no faster than one after
the other, and each would need scratch memory of its own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from types import TracebackType

import numpy as np

from edgeprune.runtime.cache import KvCache
from edgeprune.runtime.engine import Engine, Seen, Step, StepInput
from edgeprune.runtime.interrupt import Interrupt


class Turns:
    """A lock that lets threads in in the order in which they came; Python's own lets in whom it likes."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
        gate.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False


class SharedEngine:
    """An engine whose graphs run one at a time, whatever threads ask."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._turns = engine, Turns()

    def see(self, patches: np.ndarray, *, whole: bool = False, interrupt: Interrupt | None = None) -> Seen:
        """Return what the vision encoder says of patches [patches, patch pixels]; `whole`: of all, whatever its cuts are."""
        with self._turns:
            return self._engine.see(patches, whole=whole, interrupt=interrupt)

    def select(self, seen: Seen, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Apply the plan's input cut: return embeddings [1, K, hidden], indices [K]."""
        with self._turns:
            return self._engine.select(seen, prompt, tier)

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Return embeddings [1, n, hidden]."""
        with self._turns:
            return self._engine.embed(ids)

    def step(self, tokens: StepInput, cache: KvCache) -> Step:
        """Run new tokens on top of a cache."""
        with self._turns:
            return self._engine.step(tokens, cache)

    def rate(self, split: np.ndarray, step: int) -> float:
        """Return the share of visual tokens that the plan's predictor keeps for a decode step."""
        with self._turns:
            return self._engine.rate(split, step)
