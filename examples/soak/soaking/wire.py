"""HTTP by hand, for what no library does: to go away in any moment, to read and to write slowly."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

CHAT = "/v1/chat/completions"
PATIENCE = 90.0  # seconds for anything to come; what takes longer hangs


@dataclass(frozen=True)
class Place:
    """Where the server is, and the key to show."""

    host: str
    port: int
    key: str

    @property
    def url(self) -> str:
        """The address."""
        return f"http://{self.host}:{self.port}"


class Line:
    """One connection, for one request."""

    def __init__(self, place: Place) -> None:
        self._connection = http.client.HTTPConnection(place.host, place.port, timeout=PATIENCE)
        self._connection.connect()
        self._key = place.key
        self._response: http.client.HTTPResponse | None = None
        self.port: int = self._connection.sock.getsockname()[1]

    def send_head(self, length: int | None, method: str = "POST", path: str = CHAT, **headers: str) -> None:
        """Send a request's head; `length` None is a body in chunks. `headers`: names with underscores; "" leaves one out."""
        given = {"authorization": f"Bearer {self._key}", "content_type": "application/json", **headers}
        given |= {"transfer_encoding": "chunked"} if length is None else {"content_length": str(length)}
        self._connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in given.items():
            if value:
                self._connection.putheader(name.replace("_", "-"), value)
        self._connection.endheaders()

    def send(self, data: bytes) -> None:
        """Send a part of the body as it stands."""
        self._connection.send(data)

    def babble(self, data: bytes) -> bytes:
        """Send what is no request, and return what came back."""
        self.send(data)
        answer: bytes = self._connection.sock.recv(1 << 16)
        return answer

    def ask(self, body: Mapping[str, Any]) -> None:
        """Send a whole request."""
        data = json.dumps(body).encode()
        self.send_head(len(data))
        self.send(data)

    def status(self) -> int:
        """Wait for the head of the response and return its status."""
        self._response = self._connection.getresponse()
        return self._response.status

    def header(self, name: str) -> str | None:
        """Return a header of the response."""
        assert self._response is not None
        return self._response.getheader(name)

    def json(self) -> Any:
        """Return the body of the response."""
        assert self._response is not None
        return json.loads(self._response.read())

    def events(self) -> Iterator[Any]:
        """Yield server-sent events as they come; the last one is None, for [DONE]."""
        assert self._response is not None
        for line in self._response:
            if line.startswith(b"data: "):
                yield None if line.strip() == b"data: [DONE]" else json.loads(line[6:])

    def leave(self, *, reset: bool = False) -> float:
        """Close, as a crash would where `reset` is said; return when, in seconds of the monotonic clock."""
        if reset and self._connection.sock is not None:
            self._connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        when = time.monotonic()
        if self._response is not None:
            self._response.close()
        self._connection.close()
        return when


def error_code(body: Any) -> str | None:
    """Return the code of an error's body."""
    try:
        return str(body["error"]["code"])
    except (KeyError, TypeError):
        return None
