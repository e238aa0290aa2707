"""The model behind the server: loaded in a thread, used by worker threads, released at shutdown; and the Prometheus metrics."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from edgeprune.runtime import Receipt, Runtime
from edgeprune.runtime.server.errors import ServerLimits, not_ready, shutting_down
from edgeprune.runtime.server.jobs import AnswerJob, FairQueue

READY = ("ready", "busy")

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Service:
    """One model, `parallel` workers, and the line in front of them.

    `open_model`: returns the model and is given what to call with each phase. `failed`: called with what went wrong in it.
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
        self.stopping = False
        self._open_model, self._failed, self._parallel = open_model, failed, parallel
        self._phase = "loading"
        self._model: Runtime | None = None
        self._observers: list[Callable[[Receipt], None]] = []
        self._workers: list[threading.Thread] = []
        self._running: set[AnswerJob] = set()
        self._lock = threading.Lock()

    def observe(self, observer: Callable[[Receipt], None]) -> None:
        """Have `observer` called with the receipt of every answer; to be said before `start`."""
        self._observers.append(observer)

    def start(self) -> None:
        """Load the model in a thread of its own, and have it asked from then on."""
        threading.Thread(target=self._begin, name="loading", daemon=True).start()

    def _begin(self) -> None:
        try:
            model = self._open_model(self._note)
        except Exception as error:  # it ends the server, whatever it is
            self._failed(error)
            return
        for observer in self._observers:
            model.watch(observer)
        self._model = model
        for number in range(self._parallel):
            self._workers.append(threading.Thread(target=self._work, args=(model,), name=f"answering-{number}", daemon=True))
            self._workers[-1].start()

    def _note(self, phase: str) -> None:
        self._phase = phase if phase not in READY else self._phase  # ready is when workers are there

    @property
    def phase(self) -> str:
        """One of "loading", "warming", "ready", "busy" and "stopping"."""
        if self.stopping:
            return "stopping"
        if self._model is None:
            return self._phase
        return "busy" if self._running else "ready"

    def model(self) -> Runtime:
        """Return the model; raise ApiError (503) while there is none and after `stop`."""
        if self.stopping:
            raise shutting_down()
        if self._model is None:
            raise not_ready(self._phase)
        return self._model

    def stop(self) -> None:
        """Take no more requests, and refuse those in line; what is being answered goes on."""
        self.stopping = True
        for job in self.queue.close():
            job.reject(shutting_down())

    def cancel(self) -> None:
        """End every answer within a decode step."""
        with self._lock:
            running = list(self._running)
        for job in running:
            job.cancel()

    def join(self, seconds: float) -> None:
        """Wait after `stop` until the workers have ended, each at most so long."""
        for worker in self._workers:
            worker.join(seconds)

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._running)

    def _work(self, model: Runtime) -> None:
        while (job := self.queue.take()) is not None:
            began = time.monotonic()
            with self._lock:
                self._running.add(job)
            try:
                job.run(model)
            finally:
                with self._lock:
                    self._running.discard(job)
                self.queue.answered(time.monotonic() - began)


class ServerMetrics:
    """Counts requests; queue length and readiness are asked of the service when somebody looks."""

    def __init__(self, service: Service, registry: CollectorRegistry) -> None:
        given: dict[str, Any] = {"registry": registry}
        self._requests = Counter("edgeprune_http_requests", "Requests by status.", ["method", "path", "status"], **given)
        self._rejected = Counter("edgeprune_rejected", "Requests that got no answer, by reason.", ["reason"], **given)
        self.queued = Histogram("edgeprune_queue_seconds", "Time in line before an answer began.", buckets=_SECONDS, **given)
        Gauge("edgeprune_queue_length", "Requests in line.", **given).set_function(lambda: service.queue.waiting)
        Gauge("edgeprune_running", "Requests that are being answered.", **given).set_function(lambda: service.running)

    def request(self, method: str, path: str, status: int) -> None:
        """Count a request. `path` and `method` must be among the server's own: names from outside would grow without bound."""
        self._requests.labels(method, path, str(status)).inc()

    def rejected(self, reason: str) -> None:
        """Count a request that got no answer."""
        self._rejected.labels(reason).inc()
