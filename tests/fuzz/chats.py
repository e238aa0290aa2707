"""Chat requests: their bodies, and the whole requests around them."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from PIL import Image
from server_double import NAME, Double, data_url, user

from edgeprune.errors import UsageError
from edgeprune.runtime.generation.sampling import Sampling
from edgeprune.runtime.media import images
from edgeprune.runtime.server.errors import ApiError, ServerLimits
from edgeprune.runtime.server.request_mapping import answer_request
from edgeprune.runtime.server.schema import parse
from fuzz.mutations import bytes_variant, json_variant, text_variant
from fuzz.pictures import MOST_PIXELS
from fuzz.target import Target, demand
from fuzz.wires import Wires

_LIMITS = ServerLimits(max_body_bytes=1 << 16, max_pixels=MOST_PIXELS, max_images=3)
_URL = data_url(Image.new("RGB", (4, 4), (255, 0, 0)))
_FORM = {"name": "answer", "schema": {"type": "object"}, "strict": True}
_BODIES: tuple[dict[str, Any], ...] = (
    {"messages": [user("What is it?")]},
    {
        "model": NAME,
        "messages": [
            {"role": "system", "content": "Be short."},
            user("one two", _URL),
            {"role": "assistant", "content": "A cup."},
            user("So?"),
        ],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["\n", "."],
        "response_format": {"type": "json_schema", "json_schema": _FORM},
    },
    {
        "messages": [user("stream it", _URL)],
        "stream": True,
        "stream_options": {"include_usage": True},
        "kept": True,
        "prune": False,
    },
    {
        "messages": [user("which?")],
        "guided_choice": ["yes", "no"],
        "tier": "fast",
        "deadline_ms": 500,
        "n": 1,
        "tools": [],
        "user": "u",
    },
)
_WORDS: tuple[bytes, ...] = (
    b"Transfer-Encoding: chunked",
    b"Content-Length: 5",
    b"Content-Length: 99999999",
    b"Content-Length: -1",
    b"Content-Length: \xb2",
)
_WORDS += (
    b"Expect: 100-continue",
    b"Host: evil.example",
    b"Host: \xff",
    b"Connection: close",
    b"Content-Type: text/plain",
    b"Upgrade: websocket",
)
_WORDS += (
    b"Authorization: Bearer \xff",
    b"Content-Encoding: gzip",
    b"X: " + b"y" * 9000,
    b" folded",
    b"Content-Type: application/json; a=b",
)
_PATHS: tuple[str, ...] = (
    "/v1/models",
    "/v1/models/double",
    "/v1/models/%ff%00",
    "/health",
    "/metrics",
    "/",
    "/page.js",
    "/../x",
    "*",
    "/v1/chat/completions?a=b",
)
_PATHS += ("//", "/v1/models/" + "m" * 4000, "http://x/health", "/é", "/%", "/v1/chat/completions/")
_METHODS = ("GET", "HEAD", "POST", "PUT", "OPTIONS", "DELETE", "CONNECT", "PATCH", "get", "M" * 300)
_TEXT = ("/metrics", "/", "/page.js", "/style.css", "/icon.svg")


def _ask(data: bytes) -> bool:
    asked = answer_request(parse(data), _LIMITS, Double().prepare)
    Sampling(**asked.sampling)
    demand(asked.turn.words.encode() != b"" or bool(asked.turn.all_images), "no prompt")
    demand(sum(len(turn.all_images) for turn in (*asked.history, asked.turn)) <= _LIMITS.max_images, "too many images")
    return True


def chat_bodies() -> Target:
    """Return the target of the JSON of chat completions."""
    images.MAX_PIXELS = MOST_PIXELS
    return Target(_ask, tuple(json.dumps(body).encode() for body in _BODIES), json_variant, (ApiError, UsageError))


def http() -> Target:
    """Return the target of whole HTTP requests."""
    images.MAX_PIXELS = MOST_PIXELS
    seeds = [_request("POST", "/v1/chat/completions", json.dumps(body).encode()) for body in _BODIES]
    seeds += [
        _chunked(json.dumps(_BODIES[0]).encode()),
        *(_request("GET", path, b"") for path in ("/health", "/v1/models", "/metrics")),
    ]
    return Target(Wires(_LIMITS), tuple(seeds), _request_variant)


def _request(method: str, path: str, body: bytes, *more: bytes) -> bytes:
    head = [f"{method} {path} HTTP/1.1".encode("utf-8", "replace"), b"Host: localhost", b"Content-Type: application/json"]
    head += [f"Content-Length: {len(body)}".encode()] if body else []
    return b"\r\n".join([*head, *more, b"", body])


def _chunked(body: bytes) -> bytes:
    half = len(body) // 2
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:half], body[half:], b""))
    head = _request("POST", "/v1/chat/completions", b"", b"Transfer-Encoding: chunked")
    return head + chunks


def _request_variant(data: bytes, random: Random) -> bytes:
    head, _, body = data.partition(b"\r\n\r\n")
    way = random.randrange(8)
    if way == 0:
        return bytes_variant(data, random)
    if way == 1:
        lines = head.split(b"\r\n")
        lines.insert(random.randrange(1, len(lines) + 1), random.choice(_WORDS))
        return b"\r\n".join([*lines, b"", body])
    if way == 2:
        return _request(random.choice(_METHODS), random.choice(_PATHS), body, *random.choice(((), (b"Connection: close",))))
    if way == 3:
        return text_variant(head.decode("latin-1"), random).encode("latin-1", "replace") + b"\r\n\r\n" + body
    if way == 4:
        return _chunked(body)
    changed = json_variant(body, random) if body else body
    return _request("POST", "/v1/chat/completions", changed[:80_000])
