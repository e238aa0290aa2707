"""POST /v1/chat/completions: read the body within its limits, answer whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from edgeprune.runtime import Runtime, Sampling
from edgeprune.runtime.server.access import CLIENT
from edgeprune.runtime.server.errors import ApiError, ServerLimits, disconnected, limit_exceeded
from edgeprune.runtime.server.jobs import AnswerJob, DoneEvent, ErrorEvent, Event, job_on_loop
from edgeprune.runtime.server.request_mapping import AnswerRequest, answer_request
from edgeprune.runtime.server.responses import Completion, event
from edgeprune.runtime.server.schema import parse
from edgeprune.runtime.server.service import ServerMetrics, Service

_UPLOAD_S = 60.0  # in which a body must be there: it holds a place in the queue
_DRAIN_S = 2.0  # spent on reading what is refused, so that the client hears why and not that its connection was reset

_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


async def read_body(headers: Headers, receive: Receive, most: int) -> bytes:
    """Return the body of a request of at most `most` bytes of JSON; raise ApiError (400, 408, 413, 415)."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A page of another origin can send anything else without asking the browser's leave.
        raise ApiError(415, "unsupported_media_type", "The body must be JSON: send 'Content-Type: application/json'.")
    declared = headers.get("content-length", "")
    try:
        if not declared.isdecimal() or int(declared) <= most:
            return await asyncio.wait_for(_joined(receive, most), _UPLOAD_S)
    except asyncio.TimeoutError as error:
        raise ApiError(408, "upload_timeout", f"The body was not there within {_UPLOAD_S:g} seconds.") from error
    except _TooLarge:
        pass
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_drain(receive), _DRAIN_S)
    raise limit_exceeded("--max-body-bytes", 413, f"The body has more than the {most} bytes allowed")


class _TooLarge(Exception):
    pass


async def _joined(receive: Receive, most: int) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise disconnected()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > most:
            raise _TooLarge
    return bytes(body)


async def _drain(receive: Receive) -> None:
    more = True
    while more:
        message = await receive()
        more = message["type"] == "http.request" and message.get("more_body", False)


class Completions:
    """The endpoint. A client that goes away ends its answer within a decode step, streamed or not."""

    def __init__(self, service: Service, server_metrics: ServerMetrics) -> None:
        self._service, self._server_metrics = service, server_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        model, client = self._service.model(), scope[CLIENT]
        with self._service.queue.admit(client):
            body = await read_body(Headers(scope=scope), receive, self._service.limits.max_body_bytes)
            asked = await asyncio.to_thread(_question, body, model, self._service.limits)
            job, events = job_on_loop(asked, self._service.fit)
            watch = asyncio.create_task(self._watch(receive, client, job))
            try:
                self._service.queue.push(client, job)
                pieces = _pieces(events)
                first = await anext(pieces, "")
                self._server_metrics.queued.observe(job.queued_ms / 1e3)
                completion = Completion(job, model)
                if asked.stream:
                    await _stream(completion, first, pieces, send)
                else:
                    words = first + "".join([piece async for piece in pieces])
                    await JSONResponse(completion.body(words))(scope, receive, send)
            finally:
                watch.cancel()
                job.cancel()  # nothing to one that has ended

    async def _watch(self, receive: Receive, client: str, job: AnswerJob) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if self._service.queue.drop(client, job):
            job.reject(disconnected())
        job.cancel()


def _question(body: bytes, model: Runtime, limits: ServerLimits) -> AnswerRequest:
    # All that can be refused is, before it stands in line for nothing.
    request = parse(body)
    if request.model not in (None, model.name):
        raise ApiError(404, "model_not_found", f"There is no model {request.model!r} here, only {model.name!r}.", param="model")
    if request.tier is not None and request.tier not in model.tiers:
        has = f"Its tiers are: {', '.join(model.tiers)}." if model.tiers else "It has one plan and no tiers."
        raise ApiError(400, "invalid_value", f"The model has no tier {request.tier!r}. {has}", param="tier")
    asked = answer_request(request, limits)
    Sampling(**asked.sampling)
    return asked


async def _pieces(events: asyncio.Queue[Event]) -> AsyncIterator[str]:
    while not isinstance(happened := await events.get(), DoneEvent):
        if isinstance(happened, ErrorEvent):
            raise happened.refusal
        yield happened.text


async def _stream(completion: Completion, first: str, pieces: AsyncIterator[str], send: Send) -> None:
    async def put(data: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": more})

    await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
    await put(event(completion.first_chunk()))
    try:
        await put(event(completion.text_chunk(first)) if first else b"")
        async for text in pieces:
            await put(event(completion.text_chunk(text)) if text else b"")
    except ApiError as refusal:  # the status is sent; OpenAI's clients look for an error among the events
        await put(event(refusal.body), more=False)
        return
    await put(b"".join(map(event, completion.last_chunks())) + b"data: [DONE]\n\n", more=False)
