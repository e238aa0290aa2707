"""Requests that must be refused, each with the status and the code that it must get. A full server may say 429 to any of them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from PIL import Image

from soaking.manners import Asking
from soaking.outcomes import LOST, REFUSED, WRONG, Outcome, refusal
from soaking.wire import CHAT, Line, error_code

MAX_BODY, MAX_PIXELS, MAX_IMAGES, CONTEXT = 1 << 20, 1_000_000, 4, 2048  # what the server is started with, and the model's own


@dataclass(frozen=True)
class Bad:
    """One kind. `codes`: of which the answer's is one; `counted`: the server's figures know of it."""

    status: int
    codes: tuple[str, ...]
    body: Callable[[dict[str, Any]], bytes]
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"
    path: str = CHAT


def _with(**others: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda body: json.dumps({**body, **others}).encode()


def _asking(text: Any, *urls: str) -> Callable[[dict[str, Any]], bytes]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return lambda body: json.dumps({"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}).encode()


def _plain(data: bytes) -> Callable[[dict[str, Any]], bytes]:
    return lambda body: data


@cache
def _url(width: int, height: int, kind: str = "png") -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _broken(url: str) -> str:
    head, _, data = url.partition(",")
    whole = base64.b64decode(data)
    return f"{head},{base64.b64encode(whole[: len(whole) // 2]).decode()}"


def kinds() -> dict[str, Bad]:
    """Return all kinds by name."""
    refused = partial(Bad, 400)
    value, image, request = ("invalid_value",), ("invalid_image",), ("invalid_request",)
    small = _url(64, 64)
    return {
        "no JSON": refused(("invalid_json",), _plain(b'{"messages": [')),
        "not UTF-8": refused(("invalid_json",), _plain(b'{"messages": "\xff\xfe"}')),
        "nothing": refused(("invalid_json",), _plain(b"")),
        "deep JSON": refused(("invalid_json",), _plain(b'{"messages":' + b"[" * 20000)),
        "a list": refused(value, _plain(b"[]")),
        "messages is a number": refused(value, _with(messages=3)),
        "no messages": refused(value, _with(messages=[])),
        "a role that is none": refused(value, _with(messages=[{"role": "robot", "content": "x"}])),
        "temperature is a text": refused(value, _with(temperature="hot")),
        "max_tokens is true": refused(value, _with(max_tokens=True)),
        "max_tokens is 0": refused(request, _with(max_tokens=0)),
        "temperature below 0": refused(request, _with(temperature=-1)),
        "top_p above 1": refused(request, _with(top_p=1.5)),
        "deadline below 0": refused(value, _with(deadline_ms=-5)),
        "an unknown parameter": refused(("unknown_parameter",), _with(beams=4)),
        "two answers": refused(("unsupported_parameter",), _with(n=2)),
        "tools": refused(("unsupported_parameter",), _with(tools=[{"type": "function"}])),
        "an unknown tier": refused(value, _with(tier="luxury")),
        "an unknown model": Bad(404, ("model_not_found",), _with(model="other")),
        "two forms": refused((*value, *request), _with(guided_choice=["a"], response_format={"type": "json_object"})),
        "a schema that is none": refused(
            request,
            _with(guided_choice=None, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 3}}}),
        ),
        "an empty question": refused(value, _asking("  ")),
        "a control token": refused(request, _asking("What is <|im_end|> here?", small)),
        "too long for the model": refused(request, _asking("cube " * CONTEXT)),
        "another shape": refused(request, _asking("What is it?", _url(300, 20))),
        "a remote image": refused(image, _asking("What is it?", "https://example.com/a.png")),
        "broken base64": refused(image, _asking("What is it?", "data:image/png;base64,@@@")),
        "half an image": refused(image, _asking("What is it?", _broken(_url(300, 300, "jpeg")))),
        "text as an image": refused(image, _asking("What is it?", "data:image/png;base64,aGVsbG8=")),
        "another format": refused(image, _asking("What is it?", "data:image/gif;base64,aGVsbG8=")),
        "too many pixels": refused(("max_pixels",), _asking("What is it?", _url(2000, MAX_PIXELS // 2000 + 1))),
        "too many images": refused(("max_images",), _asking("What is it?", *[small] * (MAX_IMAGES + 1))),
        "too large": Bad(413, ("max_body_bytes",), _plain(b" " * (MAX_BODY + 1))),
        "no type": Bad(415, ("unsupported_media_type",), _with(), {"content_type": ""}),
        "a form": Bad(415, ("unsupported_media_type",), _with(), {"content_type": "multipart/form-data"}),
        "a wrong key": Bad(401, ("invalid_api_key",), _with(), {"authorization": "Bearer wrong"}),
        "no key": Bad(401, ("invalid_api_key",), _with(), {"authorization": ""}),
        "another path": Bad(404, ("not_found",), _with(), path="/v1/completions"),
        "another method": Bad(405, ("not_allowed",), _plain(b""), method="GET"),
    }


def bad(asking: Asking) -> Outcome:
    """Send a request that must be refused, and see that it is, for the right reason."""
    outcome, lot = asking.outcome, asking.lot
    name = lot.choice(sorted(_all()))
    kind = _all()[name]
    outcome.manner = f"bad: {name}"
    data = kind.body({**asking.pool.body(asking.entry), "stream": lot.random() < 0.3})
    line = Line(asking.place)
    try:
        line.send_head(None if (chunked := lot.random() < 0.2) else len(data), kind.method, kind.path, **kind.headers)
        try:
            line.send(f"{len(data):x}\r\n".encode() + data + b"\r\n0\r\n\r\n" if chunked and data else data or _end(chunked))
        except (BrokenPipeError, ConnectionResetError):
            outcome.note = "refused before its body was there"
        return _seen(outcome, kind, line)
    finally:
        line.leave()


def _end(chunked: bool) -> bytes:
    return b"0\r\n\r\n" if chunked else b""


def _seen(outcome: Outcome, kind: Bad, line: Line) -> Outcome:
    try:
        status = line.status()
    except ConnectionError:
        outcome.doubtful = 1
        return outcome.end(LOST, "reset before it was told why")
    outcome.statuses.append(status)
    code = error_code(line.json())
    if status == 429 and kind.status not in (401, 405) and kind.path == CHAT:
        return refusal(outcome, status, code, line.header("retry-after"), False)
    if status == kind.status and code in kind.codes:
        return outcome.end(REFUSED)
    return outcome.end(WRONG, f"{status} {code} instead of {kind.status} {' or '.join(kind.codes)}")


_all = cache(kinds)


def garbage(asking: Asking) -> Outcome:
    """Send what is no HTTP; the server says 400 or closes, and counts nothing."""
    line = Line(asking.place)
    try:
        said = line.babble(asking.lot.choice((b"\x16\x03\x01\x02\x00\x01\x00" * 20, b"hello\r\n\r\n", b"POST / HTTX/9.9\r\n\r\n")))
    except ConnectionError:
        said = b""
    finally:
        line.leave()
    told = not said or said.startswith(b"HTTP/1.1 400 ")
    return asking.outcome.end(REFUSED if told else WRONG, repr(said[:80]))
