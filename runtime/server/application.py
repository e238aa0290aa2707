"""The server's routes: OpenAI's API, health and metrics, and the web page."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from edgeprune.runtime.server.access import AccessMiddleware, ApiKeys
from edgeprune.runtime.server.completions import Completions
from edgeprune.runtime.server.errors import ApiError, not_ready
from edgeprune.runtime.server.responses import model_card
from edgeprune.runtime.server.samples import SampleRoutes
from edgeprune.runtime.server.service import READY, ServerMetrics, Service
from edgeprune.runtime.telemetry.metrics import Metrics

_WEB = Path(__file__).with_name("web")
_FILES = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/server.js": ("server.js", "text/javascript"),
    "/picture.js": ("picture.js", "text/javascript"),
    "/answers.js": ("answers.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def application(service: Service, keys: ApiKeys, *, local: bool, allow_origin: Sequence[str] = ()) -> ASGIApp:
    """Return the server as an ASGI application.

    `local`: accept only requests whose Host header names this machine. `allow_origin`: origins whose pages may ask from a browser.

    The page and /health need no key, because they reveal nothing about the model.
    """
    registry = CollectorRegistry()
    metrics, server_metrics = Metrics(registry), ServerMetrics(service, registry)
    service.observe(metrics.observe)
    status, samples = _StatusRoutes(service, metrics), SampleRoutes(service)
    routes = [
        Route("/v1/chat/completions", Completions(service, server_metrics), methods=["POST"]),
        Route("/v1/models", status.models, methods=["GET"]),
        Route("/v1/models/{name:path}", status.model, methods=["GET"]),
        Route("/samples", samples.samples, methods=["GET"]),
        Route("/samples/{number:int}.png", samples.picture, methods=["GET"]),
        Route("/health", status.health, methods=["GET"]),
        Route("/metrics", status.metrics, methods=["GET"]),
        *(Route(path, _File(*file), methods=["GET"]) for path, file in _FILES.items()),
    ]
    paths = [route.path for route in routes]
    served = AccessMiddleware(
        Router(routes, redirect_slashes=False), keys, server_metrics, paths=paths, public=("/health", *_FILES), local=local
    )
    if not allow_origin:
        return served
    # Outermost, because a browser asks for leave without the key and must be allowed to read refusals.
    return CORSMiddleware(
        served,
        allow_origins=allow_origin,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("retry-after",),
    )


class _StatusRoutes:
    # Routes that report on the model and the server.
    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._metrics = service, metrics

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_card(self._service.model())]})

    async def model(self, request: Request) -> Response:
        model, name = self._service.model(), request.path_params["name"]
        if name != model.name:
            raise ApiError(404, "model_not_found", f"There is no model {name!r} here, only {model.name!r}.", param="model")
        return JSONResponse(model_card(model))

    async def health(self, request: Request) -> Response:
        phase = self._service.phase
        body = {"phase": phase, "queue": self._service.queue.waiting, "running": self._service.running}
        return JSONResponse(body) if phase in READY else JSONResponse(body, 503, not_ready(phase).headers)

    async def metrics(self, request: Request) -> Response:
        page, kind = await asyncio.to_thread(self._metrics.render)
        return Response(page, headers={"content-type": kind})


class _File:
    # A file of the web page, read once.
    def __init__(self, name: str, kind: str) -> None:
        self._content, self._kind = (_WEB / name).read_bytes(), kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = Response(self._content, headers={"cache-control": "no-cache"}, media_type=self._kind)
        await response(scope, receive, send)
