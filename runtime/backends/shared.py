"""Access of several conversations to one backend: a fair lock, and out-of-memory errors.

Graphs run one at a time, in order of arrival: on one device two parallel graphs are no faster than two sequential ones, and each
would need its own scratch memory. Decode steps of concurrent answers are one pass where the backend can (`step_batches`), and
alternate otherwise.

Out-of-memory errors of a backend become an EngineError with a one-line message. ONNX Runtime's exceptions have no common base, and
numpy raises MemoryError. The answer ends with finish_reason "error"; its conversation and all others can continue.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import numpy as np

from edgeprune.errors import EngineError, UsageError
from edgeprune.runtime.backends.interface import Backend, BackendProxy, CancellationToken, Cancelled, DecoderOutput, VisionOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache
from edgeprune.runtime.backends.step_batches import StepBatches

_OUT_OF_MEMORY_MESSAGES = ("failed to allocate", "bad_alloc", "out of memory", "cannot allocate memory", "bad allocation")
_HINT = "Ask with fewer images or a lower max_kv_bytes, or close other programs."


class FifoLock:
    """A reentrant lock that serves threads in order of arrival, which Python's locks do not guarantee.

    Cancellation of a request ends its wait, because the prefill of another request can take seconds.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._owner: int | None = None  # thread id
        self._waiting: deque[_Waiter] = deque()

    @contextmanager
    def acquire(self, cancellation: CancellationToken | None = None) -> Iterator[None]:
        """Hold the lock while the block runs. Raises Cancelled, without the lock, if `cancellation` comes first."""
        thread = threading.get_ident()
        if self._owner == thread:  # safe without the guard: no other thread writes this thread's id
            yield
            return
        with self._guard:
            waiter = _Waiter(thread)
            if self._owner is None:
                self._owner = thread
            else:
                self._waiting.append(waiter)
        if self._owner != thread:
            self._wait(waiter, cancellation or CancellationToken())
        try:
            yield
        finally:
            self._release()

    @property
    def held(self) -> bool:
        """Whether this thread holds the lock."""
        return self._owner == threading.get_ident()

    def _wait(self, waiter: _Waiter, cancellation: CancellationToken) -> None:
        try:
            with cancellation.on_cancel(lambda: self._remove(waiter)):
                waiter.gate.acquire()
        except BaseException:  # KeyboardInterrupt: a lock that was already passed to this thread must be released
            self._remove(waiter)
            if not waiter.removed:
                self._release()
            raise
        if waiter.removed:
            raise Cancelled

    def _remove(self, waiter: _Waiter) -> None:
        with self._guard:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                waiter.removed = True
                waiter.gate.release()

    def _release(self) -> None:
        with self._guard:
            self._owner = None
            if self._waiting:
                waiter = self._waiting.popleft()
                self._owner = waiter.thread
                waiter.gate.release()


class _Waiter:
    # One waiting thread. `removed`: its request was cancelled first. `gate`: held until the thread may continue.
    def __init__(self, thread: int) -> None:
        self.thread, self.removed, self.gate = thread, False, threading.Lock()
        self.gate.acquire()


class GuardedBackend(BackendProxy):
    """A thread-safe backend proxy: graphs run one at a time, and out-of-memory errors become EngineError.

    `shared_steps`: decode steps of several threads run as one pass. A thread that submits one must not hold `lock`.
    """

    def __init__(self, backend: Backend, lock: FifoLock) -> None:
        super().__init__(backend)
        self._lock = lock
        most = getattr(backend, "steps_at_once", 1)
        self._batches = StepBatches(self._run_steps, lock.acquire, most) if most > 1 else None

    @property
    def shared_steps(self) -> bool:
        """Whether decode steps of several threads run as one pass."""
        return self._batches is not None

    def close(self) -> None:
        """Wait for the graph that runs and release the backend's memory. Later calls raise UsageError."""
        closed: Any = _Closed()
        with self._lock.acquire():
            backend, self._backend = self._backend, closed
        close = getattr(backend, "close", None)  # ONNX Runtime frees a session with its last reference
        if close is not None:
            close()

    def encode_image(
        self, patches: np.ndarray, *, unpruned: bool = False, cancellation: CancellationToken | None = None
    ) -> VisionOutput:
        """Run the vision encoder under the lock."""
        with self._lock.acquire(cancellation), _out_of_memory_as_error("the vision encoder"):
            return self._backend.encode_image(patches, unpruned=unpruned, cancellation=cancellation)

    def select_tokens(self, vision_output: VisionOutput, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, ...]:
        """Apply the input cut under the lock."""
        with self._lock.acquire(), _out_of_memory_as_error("the selection"):
            return self._backend.select_tokens(vision_output, prompt, tier)

    def embed_tokens(self, ids: Sequence[int]) -> np.ndarray:
        """Embed tokens under the lock; that of a step, which waits for its pass later, at once."""
        with nullcontext() if self._batches and len(ids) == 1 else self._lock.acquire(), _out_of_memory_as_error("the embedding"):
            return self._backend.embed_tokens(ids)

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Run the decoder under the lock, a decode step together with those of other threads."""
        if self._batches is not None and tokens.is_step and not self._lock.held:
            return self._batches.forward(tokens, cache, cancellation)
        with self._lock.acquire(cancellation), _out_of_memory_as_error("the decoder"):
            return self._backend.forward(tokens, cache, cancellation=cancellation)

    def _run_steps(self, steps: Sequence[tuple[DecoderInput, KvCache]]) -> list[DecoderOutput]:
        backend: Any = self._backend
        with _out_of_memory_as_error("the decoder"):
            outputs: list[DecoderOutput] = backend.forward_steps(steps)
            return outputs

    def predict_keep_ratio(self, split: np.ndarray, step: int) -> float:
        """Run the predictor under the lock."""
        with self._lock.acquire(), _out_of_memory_as_error("the predictor"):
            return self._backend.predict_keep_ratio(split, step)


def closed_model() -> UsageError:
    """Return the error for a question to a model that was closed."""
    return UsageError("This model was closed.", hint="Load the bundle again.")


class _Closed:
    # Stands for a backend that was closed.
    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(name) if name == "close" else closed_model()


@contextmanager
def _out_of_memory_as_error(part: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        message = (str(error).splitlines() or [""])[0]
        if not isinstance(error, MemoryError) and not any(text in message.lower() for text in _OUT_OF_MEMORY_MESSAGES):
            raise
        raise EngineError(f"Memory ran out in {part}: {message or 'nothing more is known'}.", hint=_HINT) from error
