"""Bounds of connections, below the application: how many there are, and how long one may say nothing or read nothing.

uvicorn has no limit for the time that a request's head takes, and its limit of connections turns away whoever comes last, also a
health check. Here the connection that has waited longest without a request gives way to a new one.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_HEAD_S = 10.0  # from the connection, or from the last response, to the end of the next request's head
_STALL_S = 30.0  # for a client that does not read what it asked for
_OTHER_FILES = 64  # descriptors left for everything but connections


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 of uvicorn, whose connections are ended once they are idle or stalled for too long.

    `most`: connections at a time, set by a subclass because uvicorn makes the objects. A connection with a request in progress
    never gives way.
    """

    most: int

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._idle: asyncio.TimerHandle | None = None  # runs while no request is in progress
        self._stalled: asyncio.TimerHandle | None = None  # runs while the client reads nothing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request, and make room if there are too many connections."""
        super().connection_made(transport)
        self._time_idleness()
        if len(self.connections) > self.most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self._time_idleness()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self._time_idleness()

    def pause_writing(self) -> None:
        """Begin to wait for a client that reads nothing."""
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(_STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        """End that wait."""
        super().resume_writing()
        self._stalled = _cancelled(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._idle, self._stalled = _cancelled(self._idle), _cancelled(self._stalled)
        super().connection_lost(exc)

    def _time_idleness(self) -> None:
        # Bytes that are no complete head do not restart the timer, nor does a body that comes after its response.
        if self.cycle is not None and not self.cycle.response_complete:
            self._idle = _cancelled(self._idle)
        elif self._idle is None and not self.transport.is_closing():
            self._idle = self.loop.call_later(_HEAD_S, self.transport.abort)

    def _make_room(self) -> None:
        idle = {each: each._idle.when() for each in self.connections if isinstance(each, BoundedProtocol) and each._idle}
        longest = min(idle, key=lambda each: idle[each])  # never empty: this connection is idle
        longest.connections.discard(longest)  # at once, for the next connection counts before the loop has closed this one
        longest.transport.abort()


def connection_limit(wanted: int) -> int:
    """Return how many connections the process can hold, at most `wanted`: each needs a file descriptor."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if files == resource.RLIM_INFINITY else max(1, min(wanted, files - _OTHER_FILES))


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None
