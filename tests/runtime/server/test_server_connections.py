"""Connections by hand: half a request, more than the server holds, names of others, and lengths said twice."""

from __future__ import annotations

import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from server_double import PATIENCE, Double, figure, serving, user

from edgeprune.errors import UsageError
from edgeprune.runtime.server import ServerLimits, ServerOptions, connections

HALF = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
WHOLE = HALF + b"\r\n"


@contextmanager
def connected(url: str, said: bytes = b"") -> Iterator[socket.socket]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE) as line:
        line.sendall(said)
        yield line


def is_closed(line: socket.socket) -> bool:
    """Read to the end, which a reset is as well."""
    try:
        while line.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_HEAD_S", 0.3)
    monkeypatch.setattr(connections, "_STALL_S", 0.3)


@pytest.mark.parametrize(
    "said", [b"", HALF, WHOLE, WHOLE + HALF, b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"]
)
def test_a_connection_that_asks_nothing_is_ended(said: bytes, hasty: None) -> None:
    with serving(Double()) as url, connected(url, said) as line:
        began = time.monotonic()
        trickle = threading.Event()

        def feed() -> None:  # a byte now and then does not help
            while not trickle.wait(0.05):
                try:
                    line.sendall(b"x")
                except OSError:
                    return

        feeding = threading.Thread(target=feed)
        feeding.start()
        assert is_closed(line)
        trickle.set()
        feeding.join(PATIENCE)
        assert time.monotonic() - began < PATIENCE / 2


def test_an_answer_takes_as_long_as_it_takes(hasty: None) -> None:
    double = Double(held=True)
    with serving(double) as url:
        threading.Timer(1.0, double.release).start()
        answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": [user("a cup")]}, timeout=PATIENCE)
        assert answer.json()["choices"][0]["message"]["content"] == "a cup "


def test_a_client_that_does_not_read_gives_its_place_back(hasty: None) -> None:
    body = json.dumps({"messages": [user(("w" * 10_000 + " ") * 1000)], "stream": True}).encode()  # more than the system buffers
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(Double(), limits=ServerLimits(per_client=1)) as url, connected(url) as line:
        line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert line.recv(100).startswith(b"HTTP/1.1 200 ")
        end = time.monotonic() + PATIENCE
        while httpx.post(f"{url}/v1/chat/completions", json={"messages": [user("a")]}, timeout=PATIENCE).status_code == 429:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_the_longest_idle_connection_gives_way() -> None:
    double = Double(held=True)
    with serving(double, limits=ServerLimits(max_connections=10)) as url, ExitStack() as stack:
        busy = threading.Thread(target=httpx.post, args=(f"{url}/v1/chat/completions",), kwargs={"json": {"messages": [user("a")]}})
        busy.start()
        double.wait(lambda: len(double.order) == 1)
        lines = [stack.enter_context(connected(url, HALF)) for _ in range(100)]
        assert all(is_closed(line) for line in lines[:80])
        for _ in range(20):
            assert httpx.get(f"{url}/health", timeout=PATIENCE).json()["running"] == 1
        double.release()
        busy.join(PATIENCE)
        assert double.receipts[0].finish_reason == "end"


def test_connections_fit_the_files_that_the_process_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 4096))
    assert connections.connection_limit(256) == 36 and connections.connection_limit(20) == 20


def test_a_length_that_is_said_in_two_ways() -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunk = b"0\r\n\r\n" + WHOLE
    with serving(Double()) as url:
        for lengths in (
            b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
            b"transfer-encoding: chunked\r\ncontent-length: 0\r\n",
        ):
            with connected(url, head + lengths + b"\r\n" + chunk) as line:
                said = b""
                while data := line.recv(1 << 16):
                    said += data
            assert said.startswith(b"HTTP/1.1 400 ") and b"ambiguous_length" in said and said.count(b"HTTP/1.1") == 1
        for lengths in (
            b"Content-Length: 5\r\nContent-Length: 6\r\n",
            b"Transfer-Encoding: gzip, chunked\r\n",
            b"X: " + b"y" * 100_000 + b"\r\n",
        ):
            with connected(url, head + lengths + b"\r\n" + chunk) as line:
                assert line.recv(1 << 16).startswith(b"HTTP/1.1 400 ")
        assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize("named", [False, True])
def test_forwarded_names_count_only_from_a_proxy_that_is_named(named: bool) -> None:
    double = Double(held=True)
    with serving(double, limits=ServerLimits(per_client=1), forwarded_allow_ips=("127.0.0.1",) if named else ()) as url:
        first = threading.Thread(
            target=httpx.post,
            args=(f"{url}/v1/chat/completions",),
            kwargs={"json": {"messages": [user("a")]}, "headers": {"x-forwarded-for": "10.0.0.1"}, "timeout": PATIENCE},
        )
        first.start()
        double.wait(lambda: len(double.order) == 1)
        threading.Timer(0.2, double.release).start()
        headers = {"x-forwarded-for": "10.0.0.2"}
        second = httpx.post(f"{url}/v1/chat/completions", json={"messages": [user("b")]}, headers=headers, timeout=PATIENCE)
        assert second.status_code == (200 if named else 429)
        assert figure(url, 'edgeprune_rejected_total{reason="per_client"}') == (not named)
        first.join(PATIENCE)


@pytest.mark.parametrize("options", [{}, {"no_auth": True}, {"keys": ("sesame",)}, {"host": "::1", "no_auth": True}])
def test_a_loopback_address_answers_only_to_its_own_names(options: dict[str, Any]) -> None:
    with serving(Double(), **options) as url:
        for name in ("rebound.example", "rebound.example:80", "127.0.0.1.example", "[::2]:8000", ""):
            assert httpx.get(f"{url}/health", headers={"host": name}).status_code == 403, name
        for name in ("localhost", "LocalHost:1", "127.0.0.1:8000", "[::1]", "[::1]:8000"):
            assert httpx.get(f"{url}/health", headers={"host": name}).status_code == 200, name


def test_pages_of_other_origins() -> None:
    ours, other = "https://robots.example", "https://other.example"
    asking = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    with serving(Double(), keys=("sesame",), allow_origin=(ours,)) as url:
        path = f"{url}/v1/chat/completions"
        assert httpx.options(path, headers={"origin": ours, **asking}).headers["access-control-allow-origin"] == ours
        assert httpx.options(path, headers={"origin": other, **asking}).status_code == 400
        answer = httpx.post(path, json={}, headers={"origin": ours})
        assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == ours
        assert "access-control-allow-origin" not in httpx.post(path, json={}, headers={"origin": other}).headers
    with serving(Double()) as url:
        answer = httpx.options(f"{url}/v1/chat/completions", headers={"origin": ours, **asking})
        assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parallel": 0}, "--parallel"),
        ({"grace": -1.0}, "--grace"),
        ({"grace": float("nan")}, "--grace"),
        ({"forwarded_allow_ips": ("*",)}, "--forwarded-allow-ips"),
        ({"forwarded_allow_ips": ("proxy",)}, "--forwarded-allow-ips"),
        ({"allow_origin": ("https://a.example/",)}, "--allow-origin"),
        ({"allow_origin": ("a.example",)}, "--allow-origin"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ServerOptions(**options)  # type: ignore[arg-type]
