"""What stands between conversations and the one backend that they share.

Whoever came first is served first, one graph at a time. Answers that are generated at once take turns step by step: on one device
two steps beside each other are no faster than one after the other, and each would need scratch memory of its own.

Memory that runs out inside a backend is said in one line. ONNX Runtime raises types of its own for it, without a common base, and
numpy raises Python's MemoryError. An answer that meets either ends with finish_reason "error"; its conversation and all others go
on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from edgeprune.errors import EngineError
from edgeprune.runtime.backends.interface import BackendProxy, Engine, Interrupt, Interrupted, Seen, Step
from edgeprune.runtime.backends.kv_cache import KvCache, StepInput

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


class GuardedBackend(BackendProxy):
    """A backend whose graphs run one at a time, whatever threads ask, and that raises EngineError where memory ran out."""

    def __init__(self, backend: Engine, turns: Turns) -> None:
        super().__init__(backend)
        self._turns = turns

    def see(self, patches: np.ndarray, *, whole: bool = False, interrupt: Interrupt | None = None) -> Seen:
        """Look at patches when it is this thread's turn."""
        with self._turns.taken(interrupt), _out_of_memory_as_error("the vision encoder"):
            return self._backend.see(patches, whole=whole, interrupt=interrupt)

    def select(self, seen: Seen, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Apply a plan's input cut when it is this thread's turn."""
        with self._turns.taken(), _out_of_memory_as_error("the selection"):
            return self._backend.select(seen, prompt, tier)

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Embed tokens when it is this thread's turn."""
        with self._turns.taken(), _out_of_memory_as_error("the embedding"):
            return self._backend.embed(ids)

    def step(self, tokens: StepInput, cache: KvCache, *, interrupt: Interrupt | None = None) -> Step:
        """Run new tokens when it is this thread's turn."""
        with self._turns.taken(interrupt), _out_of_memory_as_error("the decoder"):
            return self._backend.step(tokens, cache, interrupt=interrupt)

    def rate(self, split: np.ndarray, step: int) -> float:
        """Ask the predictor when it is this thread's turn."""
        with self._turns.taken(), _out_of_memory_as_error("the predictor"):
            return self._backend.rate(split, step)


@contextmanager
def _out_of_memory_as_error(part: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        told = (str(error).splitlines() or [""])[0]
        if not isinstance(error, MemoryError) and not any(sign in told.lower() for sign in _SIGNS):
            raise
        raise EngineError(f"Memory ran out in {part}: {told or 'nothing more is known'}.", hint=_HINT) from error
