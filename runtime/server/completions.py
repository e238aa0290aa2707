"""POST /v1/chat/completions: read the body within the limits, and answer in one response or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from edgeprune.errors import EdgePruneError
from edgeprune.runtime import Runtime, Sampling
from edgeprune.runtime.server.access import CLIENT
from edgeprune.runtime.server.errors import ApiError, ServerLimits, api_error_of, disconnected, limit_exceeded
from edgeprune.runtime.server.jobs import AnswerJob, DoneEvent, ErrorEvent, Event, job_on_loop
from edgeprune.runtime.server.request_mapping import AnswerRequest, Prepare, answer_request, sampling_options
from edgeprune.runtime.server.responses import Completion, event
from edgeprune.runtime.server.schema import parse
from edgeprune.runtime.server.service import ServerMetrics, Service

_UPLOAD_S = 60.0  # time limit for a body, because it occupies a place in the queue
_DRAIN_S = 2.0  # time spent reading a rejected body, so that the client gets the error instead of a connection reset
_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


async def read_body(headers: Headers, receive: Receive, most: int) -> bytes:
    """Return the JSON body of a request, at most `most` bytes. Raises ApiError (400, 408, 413, 415)."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Browsers send other content types across origins without a CORS preflight.
        raise ApiError(415, "unsupported_media_type", "The body must be JSON: send 'Content-Type: application/json'.")
    declared = headers.get("content-length", "")
    try:
        if not declared.isdecimal() or int(declared) <= most:
            return await asyncio.wait_for(_receive_body(receive, most), _UPLOAD_S)
    except asyncio.TimeoutError as error:
        raise ApiError(408, "upload_timeout", f"The body was not there within {_UPLOAD_S:g} seconds.") from error
    except _TooLarge:
        pass
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_drain(receive), _DRAIN_S)
    raise limit_exceeded("--max-body-bytes", 413, f"The body has more than the {most} bytes allowed")


class _TooLarge(Exception):
    pass


async def _receive_body(receive: Receive, max_bytes: int) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise disconnected()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > max_bytes:
            raise _TooLarge
    return bytes(body)


async def _drain(receive: Receive) -> None:
    more = True
    while more:
        message = await receive()
        more = message["type"] == "http.request" and message.get("more_body", False)


class Completions:
    """The endpoint. When a client disconnects, its answer is cancelled within a decode step, streamed or not."""

    def __init__(self, service: Service, server_metrics: ServerMetrics) -> None:
        self._service, self._server_metrics = service, server_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        model, client, arrived = self._service.model(), scope[CLIENT], time.monotonic()
        with self._service.queue.admit(client):
            body = await read_body(Headers(scope=scope), receive, self._service.limits.max_body_bytes)
            disconnect = asyncio.create_task(_disconnect(receive))
            try:
                request = await self._prepared(body, model, client, disconnect)
                job, events = job_on_loop(request, arrived)
                disconnect.add_done_callback(lambda _: self._abandon(client, job))
                self._service.queue.push(client, job)
                pieces = _pieces(events)
                first = await anext(pieces, "")
                self._server_metrics.queued.observe(job.queued_ms / 1e3)
                completion = Completion(job, model)
                if request.stream:
                    await _stream(completion, first, pieces, send)
                else:
                    text = first + "".join([piece async for piece in pieces])
                    await JSONResponse(completion.body(text))(scope, receive, send)
            finally:
                disconnect.cancel()  # abandons the job, which has no effect on a finished one

    async def _prepared(self, body: bytes, model: Runtime, client: str, disconnect: asyncio.Task[None]) -> AnswerRequest:
        # Ends at once when the client goes away. The thread then ends after the image that it is at.
        def check() -> None:
            if disconnect.done():
                raise disconnected()

        prepare = partial(model.prepare, fit=self._service.fit)
        work = partial(_validated_or_refused, body, model, self._service.limits, prepare, check)
        preparation = asyncio.create_task(self._service.preparation.run(client, work))
        try:
            await asyncio.wait((preparation, disconnect), return_when=asyncio.FIRST_COMPLETED)
            if not preparation.done():
                raise disconnected()
        finally:
            preparation.cancel()
        result = preparation.result()
        if isinstance(result, ApiError):
            raise result
        return result

    def _abandon(self, client: str, job: AnswerJob) -> None:
        if self._service.queue.drop(client, job):
            job.reject(disconnected())
        job.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _validated_or_refused(*arguments: Any) -> AnswerRequest | ApiError:
    # An error is returned without its traceback, whose frames would keep the images until the next garbage collection.
    try:
        return _validated_request(*arguments)
    except ApiError as error:
        refusal = error
    except EdgePruneError as error:
        refusal = api_error_of(error)
    refusal.__traceback__ = refusal.__cause__ = refusal.__context__ = None
    return refusal


def _validated_request(
    body: bytes, model: Runtime, limits: ServerLimits, prepare: Prepare, check: Callable[[], None]
) -> AnswerRequest:
    # Validate everything before the request enters the queue.
    request = parse(body)
    if request.model not in (None, model.name):
        raise ApiError(404, "model_not_found", f"There is no model {request.model!r} here, only {model.name!r}.", param="model")
    if request.tier is not None and request.tier not in model.tiers:
        has = f"Its tiers are: {', '.join(model.tiers)}." if model.tiers else "It has one plan and no tiers."
        raise ApiError(400, "invalid_value", f"The model has no tier {request.tier!r}. {has}", param="tier")
    Sampling(**sampling_options(request))  # raises for invalid options
    return answer_request(request, limits, prepare, video=model.kind == "video", check=check)


async def _pieces(events: asyncio.Queue[Event]) -> AsyncIterator[str]:
    while not isinstance(received := await events.get(), DoneEvent):
        if isinstance(received, ErrorEvent):
            raise received.refusal
        yield received.text


async def _stream(completion: Completion, first: str, pieces: AsyncIterator[str], send: Send) -> None:
    async def put(data: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": more})

    await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
    await put(event(completion.first_chunk()))
    try:
        await put(event(completion.text_chunk(first)) if first else b"")
        async for text in pieces:
            await put(event(completion.text_chunk(text)) if text else b"")
    except ApiError as refusal:  # the status is already sent, and OpenAI's clients accept an error as an event
        await put(event(refusal.body), more=False)
        return
    await put(b"".join(map(event, completion.last_chunks())) + b"data: [DONE]\n\n", more=False)
