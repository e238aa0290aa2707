"""Reading a request's body, within its bounds."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.types import Receive

from edgeprune.runtime.server.refusals import Refusal, disconnected, too_much

_UPLOAD_S = 60.0  # in which a body must be there: it holds a place in the queue
_DRAIN_S = 2.0  # spent on reading what is refused, so that the client hears why and not that its connection was reset


async def read_body(headers: Headers, receive: Receive, most: int) -> bytes:
    """Return the body of a request of at most `most` bytes of JSON; raise Refusal (400, 408, 413, 415)."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A page of another origin can send anything else without asking the browser's leave.
        raise Refusal(415, "unsupported_media_type", "The body must be JSON: send 'Content-Type: application/json'.")
    declared = headers.get("content-length", "")
    try:
        if not declared.isdecimal() or int(declared) <= most:
            return await asyncio.wait_for(_joined(receive, most), _UPLOAD_S)
    except asyncio.TimeoutError as error:
        raise Refusal(408, "upload_timeout", f"The body was not there within {_UPLOAD_S:g} seconds.") from error
    except _TooLarge:
        pass
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_drain(receive), _DRAIN_S)
    raise too_much("--max-body-bytes", 413, f"The body has more than the {most} bytes allowed")


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
