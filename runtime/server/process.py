"""The server process. It listens while the model loads, and shuts down gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import uvicorn

from edgeprune.errors import UsageError
from edgeprune.runtime import Runtime, load
from edgeprune.runtime.server.access import ApiKeys, check_exposure, check_origins, check_proxies, is_loopback
from edgeprune.runtime.server.application import application
from edgeprune.runtime.server.connections import BoundedProtocol, connection_limit
from edgeprune.runtime.server.errors import ServerLimits
from edgeprune.runtime.server.service import Service

MAX_GRACE_S = 86_400.0
_CANCEL_GRACE_S = 5.0  # between cancellation and closing the connections
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class ServerOptions:
    """The options of a server.

    `keys`: bearer keys; without keys, a host that other machines can reach needs `no_auth`. `parallel`: answers at a time, as
    for `load`. `grace`: seconds that running answers have to finish at shutdown. `fit`: as in `Runtime.generate`.
    `forwarded_allow_ips`: addresses of proxies whose X-Forwarded-For names the client. `allow_origin`: origins of web pages that
    may ask from a browser, "*" for all. Raises UsageError for values out of range.
    """

    keys: Sequence[str] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    no_auth: bool = False
    limits: ServerLimits = field(default_factory=ServerLimits)
    parallel: int = 1
    grace: float = 30.0
    fit: str = "exact"
    forwarded_allow_ips: Sequence[str] = ()
    allow_origin: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.parallel < 1:
            raise UsageError(f"--parallel must be 1 or more, not {self.parallel}.")
        if not 0 <= self.grace <= MAX_GRACE_S:
            raise UsageError(f"--grace must be from 0 to {MAX_GRACE_S:g} seconds, not {self.grace}.")
        check_proxies(self.forwarded_allow_ips)
        check_origins(self.allow_origin)


def serve(
    bundle: str | os.PathLike[str],
    options: ServerOptions | None = None,
    *,
    announce: Callable[[str], None] = lambda url: None,
    **opening: Any,
) -> None:
    """Serve a bundle until SIGTERM or SIGINT.

    `announce`: called with the URL once the server listens. `opening`: keyword arguments of `load`. Raises UsageError when it
    cannot listen on the address, and the errors of `load`.
    """
    options = options or ServerOptions()

    def open_model(on_phase: Callable[[str], None]) -> Runtime:
        return load(bundle, on_phase=on_phase, warm_up=True, parallel=options.parallel, **opening)

    Server(open_model, options, announce).run()


class Server:
    """A server with an open socket. `open_model`: loads the model and reports each phase to the given callback."""

    def __init__(
        self,
        open_model: Callable[[Callable[[str], None]], Runtime],
        options: ServerOptions,
        announce: Callable[[str], None] = lambda url: None,
    ) -> None:
        keys = ApiKeys(options.keys)
        check_exposure(options.host, keys, options.no_auth)
        self._service = Service(open_model, options.limits, parallel=options.parallel, fit=options.fit, failed=self._fail)
        self._failure: Exception | None = None
        self._socket = _listening_socket(options.host, options.port)
        config = uvicorn.Config(
            application(self._service, keys, local=is_loopback(options.host), allow_origin=options.allow_origin),
            loop="asyncio",
            http=_protocol(options.limits),
            proxy_headers=bool(options.forwarded_allow_ips),  # by default uvicorn believes whoever asks from this machine
            forwarded_allow_ips=list(options.forwarded_allow_ips),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",  # uvicorn's own request lines contain the query and the address
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(options.grace + _CANCEL_GRACE_S)),
        )
        self._loop = _Loop(config, self._service, options.grace, lambda: announce(self.url))

    @property
    def url(self) -> str:
        """The URL of the server."""
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self) -> None:
        """Serve until `stop`, SIGTERM or SIGINT. Raises the error of a failed model load."""
        self._service.start()
        self._loop.run(sockets=[self._socket])
        self._service.join(_CANCEL_GRACE_S)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Shut down gracefully, as after a signal. May be called from any thread."""
        self._loop.should_exit = True

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self.stop()


class _Loop(uvicorn.Server):
    # uvicorn.Server with our own shutdown. uvicorn raises the signal again after shutdown, which would end the process by it.
    def __init__(self, config: uvicorn.Config, service: Service, grace: float, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._grace, self._on_listening = service, grace, on_listening
        self._running: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._running = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.stop()
        timer = asyncio.get_running_loop().call_later(self._grace, self._service.cancel)
        await super().shutdown(sockets)
        timer.cancel()
        self._service.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A second signal cancels the running answers at once.
        if self.should_exit and self._running is not None:
            self._running.call_soon_threadsafe(self._service.cancel)
        self.should_exit = True


def _protocol(limits: ServerLimits) -> type[asyncio.Protocol]:
    class Protocol(BoundedProtocol):
        most = connection_limit(limits.max_connections)

    return Protocol


def _listening_socket(host: str, port: int) -> socket.socket:
    name = host.strip("[]")
    try:
        family = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((name, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"Cannot listen on {host}, port {port}: {reason}.", hint="Choose another --host or --port.") from error
