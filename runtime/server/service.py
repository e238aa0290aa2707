"""The server's model: loaded in a thread, used by worker threads, released at shutdown. Also the server's Prometheus metrics."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from edgeprune.runtime import Receipt, Runtime
from edgeprune.runtime.server.errors import ServerLimits, not_ready, shutting_down
from edgeprune.runtime.server.jobs import AnswerJob, FairQueue

T = TypeVar("T")
READY = ("ready", "busy")
_PREPARING = 2  # requests whose images are decoded at a time
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # histogram buckets of the time in the queue


class Service:
    """One model, `parallel` worker threads, and their queue.

    `open_model`: loads the model and reports each phase to the given callback. `failed`: called with the error if that fails.
    """

    def __init__(
        self,
        open_model: Callable[[Callable[[str], None]], Runtime],
        limits: ServerLimits,
        *,
        parallel: int = 1,
        fit: str = "exact",
        failed: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.limits, self.fit = limits, fit
        self.queue = FairQueue[AnswerJob](limits, parallel)
        self.preparation = Preparation()
        self.stopping = False
        self._open_model, self._failed, self._parallel = open_model, failed, parallel
        self._phase = "loading"
        self._model: Runtime | None = None
        self._observers: list[Callable[[Receipt], None]] = []
        self._workers: list[threading.Thread] = []
        self._running: set[AnswerJob] = set()
        self._lock = threading.Lock()

    def observe(self, observer: Callable[[Receipt], None]) -> None:
        """Call `observer` with the receipt of every answer. Must be called before `start`."""
        self._observers.append(observer)

    def start(self) -> None:
        """Load the model in a thread, then start the workers."""
        threading.Thread(target=self._load, name="loading", daemon=True).start()

    def _load(self) -> None:
        try:
            model = self._open_model(self._set_phase)
        except Exception as error:  # any failure to load ends the server
            self._failed(error)
            return
        for observer in self._observers:
            model.watch(observer)
        self._model = model
        for number in range(self._parallel):
            worker = threading.Thread(target=self._work, args=(model,), name=f"answering-{number}", daemon=True)
            worker.start()
            self._workers.append(worker)  # once it runs: `join` may come from another thread meanwhile

    def _set_phase(self, phase: str) -> None:
        self._phase = phase if phase not in READY else self._phase  # the service is ready only once it has workers

    @property
    def phase(self) -> str:
        """One of "loading", "warming", "ready", "busy" and "stopping"."""
        if self.stopping:
            return "stopping"
        if self._model is None:
            return self._phase
        return "busy" if self._running else "ready"

    def model(self) -> Runtime:
        """Return the model. Raises ApiError (503) before it is loaded and after `stop`."""
        if self.stopping:
            raise shutting_down()
        if self._model is None:
            raise not_ready(self._phase)
        return self._model

    def stop(self) -> None:
        """Accept no more requests and reject the waiting ones. Running answers continue."""
        self.stopping = True
        for job in self.queue.close():
            job.reject(shutting_down())

    def cancel(self) -> None:
        """Cancel every running answer within a decode step."""
        with self._lock:
            running = list(self._running)
        for job in running:
            job.cancel()

    def join(self, seconds: float) -> None:
        """Wait for the workers to end after `stop`, at most `seconds` for each."""
        for worker in self._workers:
            worker.join(seconds)
        self.preparation.close()

    @property
    def running(self) -> int:
        """The number of requests being answered."""
        return len(self._running)

    def _work(self, model: Runtime) -> None:
        while (job := self.queue.take()) is not None:
            started = time.monotonic()
            with self._lock:
                self._running.add(job)
            try:
                job.run(model)
            finally:
                with self._lock:
                    self._running.discard(job)
                self.queue.answered(time.monotonic() - started)


class Preparation:
    """Threads that validate requests and decode their images, few at a time, so that memory for decoding is bounded.

    Each client has one request in preparation at a time: one with many large images delays its own requests before those of others.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_PREPARING, thread_name_prefix="preparing")
        self._clients: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(self, client: str, work: Callable[[], T]) -> T:
        """Return the result of `work`, or raise its error."""
        lock = self._clients.setdefault(client, asyncio.Lock())
        await lock.acquire()
        thread = asyncio.get_running_loop().run_in_executor(self._threads, work)
        # A thread cannot be cancelled. Until it has ended, also for nobody, its client begins no other.
        thread.add_done_callback(lambda _: lock.release())
        return await asyncio.shield(thread)

    def close(self) -> None:
        """End the threads once they are idle."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class ServerMetrics:
    """Counters of requests, and gauges that read the service at each scrape."""

    def __init__(self, service: Service, registry: CollectorRegistry) -> None:
        options: dict[str, Any] = {"registry": registry}
        self._requests = Counter("edgeprune_http_requests", "Requests by status.", ["method", "path", "status"], **options)
        self._rejected = Counter("edgeprune_rejected", "Requests that got no answer, by reason.", ["reason"], **options)
        self.queued = Histogram("edgeprune_queue_seconds", "Time in line before an answer began.", buckets=_SECONDS, **options)
        Gauge("edgeprune_queue_length", "Requests in line.", **options).set_function(lambda: service.queue.waiting)
        Gauge("edgeprune_running", "Requests that are being answered.", **options).set_function(lambda: service.running)

    def request(self, method: str, path: str, status: int) -> None:
        """Count a request. `path` and `method` must come from the server's own lists, because client input has unbounded values."""
        self._requests.labels(method, path, str(status)).inc()

    def rejected(self, reason: str) -> None:
        """Count a rejected or failed request."""
        self._rejected.labels(reason).inc()
