"""The server's own figures beside those of the answers, for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from edgeprune.runtime.server.service import Service

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Tally:
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
