"""Access control: bearer keys, the client identity used by the queue, CORS, request counts and the access log.

A log line has the method, the path, the status and the time. It has no body, query, key or address.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import time
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.runtime.server.errors import ApiError, api_error_of, internal
from edgeprune.runtime.server.service import ServerMetrics

VARIABLE = "EDGEPRUNE_API_KEY"

CLIENT = "edgeprune.client"  # in a request's scope: the client's name
_WATCHED = ("/health", "/metrics")  # asked every few seconds by machines: not worth a line
_METHODS = ("GET", "HEAD", "POST", "OPTIONS")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_log = logging.getLogger("edgeprune.server")


class ApiKeys:
    """The keys that are accepted; with none, everyone is. Only their digests are held."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def client(self, authorization: bytes | None, address: str) -> str:
        """Return the client's name: its key's number, or its address where there are no keys; raise ApiError (401)."""
        if not self._digests:
            return address
        scheme, _, key = (authorization or b"").partition(b" ")
        given = _digest(key.strip())
        # All are compared, each in constant time: how long it takes says nothing of which one was nearly right.
        found = [number for number, digest in enumerate(self._digests) if hmac.compare_digest(digest, given)]
        if scheme.lower() != b"bearer" or not found:
            message = "The key is missing or wrong: send 'Authorization: Bearer KEY'."
            raise ApiError(401, "invalid_api_key", message)
        return f"key {found[0]}"


def read_keys(file: Path | None, environment: str | None) -> list[str]:
    """Return the keys in a file, one a line ('#' begins a comment), and the one of the environment; raise UsageError."""
    keys = [] if environment is None else [environment.strip()]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise UsageError(f"Cannot read the keys in {file}: {reason}.") from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise UsageError(f"{file} has no keys.", hint="Write one key a line.")
        keys += found
    for key in keys:
        if not key or not key.isascii() or any(letter.isspace() for letter in key):
            raise UsageError("A key is empty, or has letters outside ASCII or spaces in it.", hint="Such as: openssl rand -hex 24")
    return keys


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, keys: ApiKeys, no_auth: bool) -> None:
    """Raise UsageError for a server that others can reach without a key, unless that was asked for."""
    if no_auth and keys:
        raise UsageError("--no-auth contradicts the keys that are given.", hint=f"Unset {VARIABLE} and --api-key-file, or it.")
    if not (keys or no_auth or is_loopback(host)):
        raise UsageError(
            f"On --host {host} anyone who reaches this machine could ask, without a key.",
            hint=f"Give keys (--api-key-file, or {VARIABLE}), or say --no-auth.",
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class AccessMiddleware:
    """The outermost layer of the server. `public`: paths that need no key; `paths`: all that there are.

    `local`: take requests only for this machine's own names. Without keys it is all that stands between a page of another origin,
    whose name was made to point here, and the model.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        server_metrics: ServerMetrics,
        *,
        paths: Collection[str],
        public: Collection[str],
        local: bool,
    ) -> None:
        self._app, self._keys, self._server_metrics = app, keys, server_metrics
        self._paths, self._public, self._local = paths, public, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or say why not."""
        began, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        scope["app"] = self  # so that the router raises what it does not find, instead of answering in its own words
        try:
            scope[CLIENT] = self._client(scope)
            await self._app(scope, receive, watched)
        except Exception as error:
            refusal = _told(error)
            self._server_metrics.rejected(refusal.reason)
            if status == 0:
                await error_response(refusal)(scope, receive, watched)
        path, method = self._named(scope)
        self._server_metrics.request(method, path, status)
        level = logging.DEBUG if path in _WATCHED else logging.INFO
        _log.log(level, "%s %s %d %.0f ms", method, path, status, 1e3 * (time.monotonic() - began))

    def _client(self, scope: Scope) -> str:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]
        if self._local and not is_loopback(name):
            raise ApiError(403, "wrong_host", "Without a key this server answers only to this machine's own names, as localhost.")
        address = (scope.get("client") or ("unknown", 0))[0]
        if scope["path"] in self._public:
            return str(address)
        return self._keys.client(headers.get("authorization", "").encode("latin-1"), str(address))

    def _named(self, scope: Scope) -> tuple[str, str]:
        path, method = scope["path"], scope["method"]
        path = "/v1/models" if path.startswith("/v1/models/") else path
        return (path if path in self._paths else "other"), (method if method in _METHODS else "other")


def error_response(refusal: ApiError) -> Response:
    """Return the response that says why there is no answer."""
    return Response(json.dumps(refusal.body), refusal.status, refusal.headers, "application/json")


def _told(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EdgePruneError):
        return api_error_of(error)
    if isinstance(error, HTTPException):
        missing = error.status_code == 404
        return ApiError(error.status_code, "not_found" if missing else "not_allowed", f"{error.detail} on this path.")
    # Its message may hold part of a request.
    _log.error("%s in a request:\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return internal()
