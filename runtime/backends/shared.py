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
from edgeprune.runtime.backends.interface import Backend, BackendProxy, CancellationToken, Cancelled, DecoderOutput, VisionOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache

_OUT_OF_MEMORY_MESSAGES = ("failed to allocate", "bad_alloc", "out of memory", "cannot allocate memory", "bad allocation")
_HINT = "Ask with fewer images or a lower max_kv_bytes, or close other programs."


class FifoLock:
    """A lock that lets threads in in the order in which they came; Python's own lets in whom it likes.

    Whoever has the turn may take it again. A wait ends when the answer is to end for which the thread waits: another's prefill
    may take seconds.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._owner: int | None = None  # a thread's identity
        self._waiting: deque[_Waiter] = deque()

    @contextmanager
    def acquire(self, cancellation: CancellationToken | None = None) -> Iterator[None]:
        """Wait for the turn and have it while the block runs. Raises Cancelled, without the turn, if `cancellation` comes first."""
        me = threading.get_ident()
        if self._owner == me:  # which no other thread could have written
            yield
            return
        with self._guard:
            waiter = _Waiter(me)
            if self._owner is None:
                self._owner = me
            else:
                self._waiting.append(waiter)
        if self._owner != me:
            self._wait(waiter, cancellation or CancellationToken())
        try:
            yield
        finally:
            self._release()

    def _wait(self, waiter: _Waiter, cancellation: CancellationToken) -> None:
        try:
            with cancellation.on_cancel(lambda: self._leave(waiter)):
                waiter.gate.acquire()
        except BaseException:  # Ctrl-C: nobody must be given a turn that nobody takes
            self._leave(waiter)
            if not waiter.left:
                self._release()
            raise
        if waiter.left:
            raise Cancelled

    def _leave(self, waiter: _Waiter) -> None:
        with self._guard:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                waiter.left = True
                waiter.gate.release()

    def _release(self) -> None:
        with self._guard:
            self._owner = None
            if self._waiting:
                following = self._waiting.popleft()
                self._owner = following.thread
                following.gate.release()


class _Waiter:
    # Of a thread in the line. `left`: its answer ended first.
    def __init__(self, thread: int) -> None:
        self.thread, self.left, self.gate = thread, False, threading.Lock()
        self.gate.acquire()


class GuardedBackend(BackendProxy):
    """A backend whose graphs run one at a time, whatever threads ask, and that raises EngineError where memory ran out."""

    def __init__(self, backend: Backend, lock: FifoLock) -> None:
        super().__init__(backend)
        self._lock = lock

    def encode_image(
        self, patches: np.ndarray, *, unpruned: bool = False, cancellation: CancellationToken | None = None
    ) -> VisionOutput:
        """Look at patches when it is this thread's turn."""
        with self._lock.acquire(cancellation), _out_of_memory_as_error("the vision encoder"):
            return self._backend.encode_image(patches, unpruned=unpruned, cancellation=cancellation)

    def select_tokens(self, vision_output: VisionOutput, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Apply a plan's input cut when it is this thread's turn."""
        with self._lock.acquire(), _out_of_memory_as_error("the selection"):
            return self._backend.select_tokens(vision_output, prompt, tier)

    def embed_tokens(self, ids: Sequence[int]) -> np.ndarray:
        """Embed tokens when it is this thread's turn."""
        with self._lock.acquire(), _out_of_memory_as_error("the embedding"):
            return self._backend.embed_tokens(ids)

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Run new tokens when it is this thread's turn."""
        with self._lock.acquire(cancellation), _out_of_memory_as_error("the decoder"):
            return self._backend.forward(tokens, cache, cancellation=cancellation)

    def predict_keep_ratio(self, split: np.ndarray, step: int) -> float:
        """Ask the predictor when it is this thread's turn."""
        with self._lock.acquire(), _out_of_memory_as_error("the predictor"):
            return self._backend.predict_keep_ratio(split, step)


@contextmanager
def _out_of_memory_as_error(part: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        told = (str(error).splitlines() or [""])[0]
        if not isinstance(error, MemoryError) and not any(sign in told.lower() for sign in _OUT_OF_MEMORY_MESSAGES):
            raise
        raise EngineError(f"Memory ran out in {part}: {told or 'nothing more is known'}.", hint=_HINT) from error
