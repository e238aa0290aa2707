"""Memory that runs out inside an engine, said in one line.

ONNX Runtime raises types of its own for it, without a common base, and numpy raises Python's MemoryError. An answer that meets
either ends with finish_reason "error"; its conversation and all others go on.

One engine for many threads: whoever came first is served first, one graph at a time.

Answers that are generated at once take turns step by step. On one device two steps beside each other are no faster than one after
the other, and each would need scratch memory of its own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from edgeprune.errors import EngineError
from edgeprune.runtime.backends.interface import Engine, Interrupt, Interrupted, Seen, Step, StepInput
from edgeprune.runtime.backends.kv_cache import KvCache

_SIGNS = ("failed to allocate", "bad_alloc", "out of memory", "cannot allocate memory", "bad allocation")
_HINT = "Ask with fewer images or a lower max_kv_bytes, or close other programs."


class Turns:
    """A lock that lets threads in in the order in which they came; Python's own lets in whom it likes.

    Whoever has the turn may take it again. A wait ends when the answer is to end for which the thread waits: another's prefill
    may take seconds.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._owner: int | None = None  # a thread's identity
        self._waiting: deque[_Place] = deque()

    @contextmanager
    def taken(self, interrupt: Interrupt | None = None) -> Iterator[None]:
        """Wait for the turn and have it while the block runs. Raises Interrupted, without the turn, if `interrupt` comes first."""
        me = threading.get_ident()
        if self._owner == me:  # which no other thread could have written
            yield
            return
        with self._guard:
            place = _Place(me)
            if self._owner is None:
                self._owner = me
            else:
                self._waiting.append(place)
        if self._owner != me:
            self._wait(place, interrupt or Interrupt())
        try:
            yield
        finally:
            self._pass_on()

    def _wait(self, place: _Place, interrupt: Interrupt) -> None:
        try:
            with interrupt.stopping(lambda: self._leave(place)):
                place.gate.acquire()
        except BaseException:  # Ctrl-C: nobody must be given a turn that nobody takes
            self._leave(place)
            if not place.left:
                self._pass_on()
            raise
        if place.left:
            raise Interrupted

    def _leave(self, place: _Place) -> None:
        with self._guard:
            if place in self._waiting:
                self._waiting.remove(place)
                place.left = True
                place.gate.release()

    def _pass_on(self) -> None:
        with self._guard:
            self._owner = None
            if self._waiting:
                following = self._waiting.popleft()
                self._owner = following.thread
                following.gate.release()


class _Place:
    # Of a thread in the line. `left`: its answer ended first.
    def __init__(self, thread: int) -> None:
        self.thread, self.left, self.gate = thread, False, threading.Lock()
        self.gate.acquire()


class SharedEngine:
    """An engine whose graphs run one at a time, whatever threads ask."""

    def __init__(self, engine: Engine, turns: Turns) -> None:
        self._engine, self._turns = engine, turns

    def see(self, patches: np.ndarray, *, whole: bool = False, interrupt: Interrupt | None = None) -> Seen:
        """Return what the vision encoder says of patches [patches, patch pixels]; `whole`: of all, whatever its cuts are."""
        with self._turns.taken(interrupt):
            return self._engine.see(patches, whole=whole, interrupt=interrupt)

    def select(self, seen: Seen, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Apply the plan's input cut: return embeddings [1, K, hidden], indices [K]."""
        with self._turns.taken():
            return self._engine.select(seen, prompt, tier)

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Return embeddings [1, n, hidden]."""
        with self._turns.taken():
            return self._engine.embed(ids)

    def step(self, tokens: StepInput, cache: KvCache) -> Step:
        """Run new tokens on top of a cache."""
        with self._turns.taken(tokens.interrupt):
            return self._engine.step(tokens, cache)

    def rate(self, split: np.ndarray, step: int) -> float:
        """Return the share of visual tokens that the plan's predictor keeps for a decode step."""
        with self._turns.taken():
            return self._engine.rate(split, step)


class CandidEngine:
    """An engine that raises EngineError where memory ran out, whatever the one inside raises."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def see(self, patches: np.ndarray, *, whole: bool = False, interrupt: Interrupt | None = None) -> Seen:
        """Return what the vision encoder says of patches [patches, patch pixels]; `whole`: of all, whatever its cuts are."""
        with _said("the vision encoder"):
            return self._engine.see(patches, whole=whole, interrupt=interrupt)

    def select(self, seen: Seen, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Apply the plan's input cut: return embeddings [1, K, hidden], indices [K]."""
        with _said("the selection"):
            return self._engine.select(seen, prompt, tier)

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Return embeddings [1, n, hidden]."""
        with _said("the embedding"):
            return self._engine.embed(ids)

    def step(self, tokens: StepInput, cache: KvCache) -> Step:
        """Run new tokens on top of a cache."""
        with _said("the decoder"):
            return self._engine.step(tokens, cache)

    def rate(self, split: np.ndarray, step: int) -> float:
        """Return the share of visual tokens that the plan's predictor keeps for a decode step."""
        with _said("the predictor"):
            return self._engine.rate(split, step)


@contextmanager
def _said(part: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        told = (str(error).splitlines() or [""])[0]
        if not isinstance(error, MemoryError) and not any(sign in told.lower() for sign in _SIGNS):
            raise
        raise EngineError(f"Memory ran out in {part}: {told or 'nothing more is known'}.", hint=_HINT) from error
