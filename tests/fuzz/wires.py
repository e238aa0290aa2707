"""A server without a socket: whole HTTP requests as bytes of a connection, through its HTTP, gate and queue."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import weakref
from typing import Any

from h11 import LocalProtocolError
from server_double import Double
from uvicorn import Config
from uvicorn.server import ServerState

from edgeprune.runtime.server.access import ApiKeys
from edgeprune.runtime.server.application import application
from edgeprune.runtime.server.connections import BoundedProtocol
from edgeprune.runtime.server.errors import ServerLimits
from edgeprune.runtime.server.service import Service
from fuzz.target import Broken, check_message, demand


class _Wire(asyncio.Transport):
    # The client's end of a connection: what the server writes, and whether it hung up.
    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 9), "sockname": ("127.0.0.1", 8)})
        self.written, self.closed = bytearray(), False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        """Nothing comes by itself."""

    def resume_reading(self) -> None:
        """Nothing comes by itself."""


class _Protocol(BoundedProtocol):
    most = 2


class Wires:
    """The server of a double. Called with the bytes of a connection, it tells whether the first request was answered."""

    def __init__(self, limits: ServerLimits) -> None:
        logging.getLogger("edgeprune.server").setLevel(logging.CRITICAL)
        sys.setswitchinterval(2e-4)  # threads take turns several times in each case
        service = Service(lambda on_phase: Double(tiers=("quality", "fast")), limits)  # type: ignore[arg-type, return-value]
        app = application(service, ApiKeys(), local=False)
        service.start()
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._ready(service))
        self._config = Config(app, http="h11", ws="none", lifespan="off", log_config=None, log_level="critical", access_log=False)
        self._config.load()
        self._service = service
        weakref.finalize(self, _close, self._loop, service)

    async def _ready(self, service: Service) -> None:
        while service.phase != "ready":
            await asyncio.sleep(0.001)

    def __call__(self, data: bytes) -> bool:
        """Run one case."""
        written = bytes(self._loop.run_until_complete(self._talk(data)))
        demand(self._service.running == 0 and self._service.queue.waiting == 0, "a request that is still there")
        return check_response(data.partition(b"\r\n")[0], written)

    async def _talk(self, data: bytes) -> bytearray:
        state, wire = ServerState(), _Wire()
        protocol = _Protocol(self._config, state, {}, self._loop)
        protocol.connection_made(wire)
        first, second = data[: len(data) // 2], data[len(data) // 2 :]
        for part in filter(None, (first, second)):
            if not wire.closed:  # as the loop does
                self._feed(protocol, wire, part)
                await asyncio.sleep(0)
        await self._answered(protocol, wire)
        protocol.connection_lost(None)
        while state.tasks or self._service.running or self._service.queue.waiting:
            await asyncio.sleep(0.0002)
        if protocol.timeout_keep_alive_task is not None:
            protocol.timeout_keep_alive_task.cancel()
        return wire.written

    def _feed(self, protocol: Any, wire: _Wire, part: bytes) -> None:
        # uvicorn cannot refuse the rest of a request that was answered already; the loop then cuts the connection.
        try:
            protocol.data_received(part)
        except LocalProtocolError:
            demand(bool(wire.written), "no answer, and an error of the connection")
            wire.close()

    async def _answered(self, protocol: Any, wire: _Wire) -> None:
        # Until there is an answer, or the server waits for a body that never comes: then the client goes away.
        cycle = protocol.cycle
        while cycle is not None and not wire.closed and not cycle.response_complete:
            if (
                cycle.more_body
                and cycle.message_event is not None
                and not cycle.message_event.is_set()
                and not cycle.response_started
            ):
                for _ in range(3):
                    await asyncio.sleep(0)
                return
            await asyncio.sleep(0.0002)
            cycle = protocol.cycle


def _close(loop: asyncio.AbstractEventLoop, service: Service) -> None:
    service.stop()
    service.join(1.0)
    loop.close()


def check_response(request: bytes, written: bytes) -> bool:
    """Raise Broken unless what a server wrote is answers and errors in their shapes; return whether the first is an answer.

    Nothing at all is right where the client went away in the middle of a request.
    """
    if not written:
        return False
    head, _, rest = written.partition(b"\r\n\r\n")
    if b" 100 " in head.partition(b"\r\n")[0]:
        return check_response(request, rest)
    status = int(head.split(b" ", 2)[1])
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])}
    body = b"" if request.startswith(b"HEAD ") else _body(headers, rest)  # what follows is of the next request
    if status == 400 and body == b"Invalid HTTP request received.":  # uvicorn's own word for what is no HTTP
        return False
    demand(status < 500 or status in (501, 503), f"status {status}: {body[:200]!r}")
    if request.startswith(b"HEAD "):
        return status < 400
    if status >= 400:
        _check_error(status, body)
        return False
    _check_answer(request, headers, body)
    return True


def _body(headers: dict[bytes, bytes], rest: bytes) -> bytes:
    if headers.get(b"transfer-encoding") != b"chunked":
        return rest[: int(headers.get(b"content-length", len(rest)))]
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            break
        body, rest = body + rest[:length], rest[length + 2 :]
    return body


def _check_error(status: int, body: bytes) -> None:
    try:
        error = json.loads(body)["error"]
        demand(
            set(error) == {"message", "type", "param", "code"} and isinstance(error["code"], str),
            f"an error of another shape: {error}",
        )
        check_message(error["message"])
        demand(error["param"] is None or len(error["param"]) < 1000, "a very long param")
    except (ValueError, KeyError, TypeError) as problem:
        raise Broken(f"{status} with a body that is no error: {body[:200]!r}") from problem


def _check_answer(request: bytes, headers: dict[bytes, bytes], body: bytes) -> None:
    if headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event]
        demand(events[-1:] == [b"[DONE]"] or b'"error"' in events[-1], f"a stream without an end: {body[-200:]!r}")
        for event in events[:-1]:
            json.loads(event)
    elif headers.get(b"content-type") == b"application/json":
        demand(isinstance(json.loads(body), dict), "an answer that is no object")
    else:
        demand(bool(body), f"no answer to {request!r:.80}")
