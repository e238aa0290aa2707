"""Access control: bearer keys, client identities for the queue, security headers, request counts and the access log.

A log line contains method, path, status and duration. It never contains a body, query, key or address.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import re
import stat
import time
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.runtime.server.errors import ApiError, ambiguous_length, api_error_of, internal
from edgeprune.runtime.server.service import ServerMetrics

VARIABLE = "EDGEPRUNE_API_KEY"  # environment variable
CLIENT = "edgeprune.client"  # key of the client's name in a request's scope
_POLLED = ("/health", "/metrics")  # polled every few seconds, therefore logged at debug level
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
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_log = logging.getLogger("edgeprune.server")


class ApiKeys:
    """The accepted keys. Without keys every client is accepted. Only digests are stored."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def client(self, authorization: bytes | None, address: str) -> str:
        """Return the client's name: the number of its key, or its address if no keys are set. Raises ApiError (401)."""
        if not self._digests:
            return address
        scheme, _, key = (authorization or b"").partition(b" ")
        given = _digest(key.strip())
        # Compare with every key in constant time, so that timing reveals nothing.
        matches = [number for number, digest in enumerate(self._digests) if hmac.compare_digest(digest, given)]
        if scheme.lower() != b"bearer" or not matches:
            message = "The key is missing or wrong: send 'Authorization: Bearer KEY'."
            raise ApiError(401, "invalid_api_key", message)
        return f"key {matches[0]}"


def read_keys(file: Path | None, environment: str | None) -> list[str]:
    """Return the key from the environment and those of a file (one per line, '#' starts a comment). Raises UsageError."""
    keys = [] if environment is None else [environment.strip()]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            readers = file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise UsageError(f"Cannot read the keys in {file}: {reason}.") from error
        file_keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not file_keys:
            raise UsageError(f"{file} has no keys.", hint="Write one key a line.")
        if readers:
            _log.warning("Other users of this machine can read the keys in %s. Keep them to yourself: chmod 600 %s", file, file)
        keys += file_keys
    for key in keys:
        if not key or not key.isascii() or any(letter.isspace() for letter in key):
            raise UsageError("A key is empty, or has letters outside ASCII or spaces in it.", hint="Such as: openssl rand -hex 24")
    return keys


def is_loopback(host: str) -> bool:
    """Tell whether a host can be reached only from this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_exposure(host: str, keys: ApiKeys, no_auth: bool) -> None:
    """Raise UsageError for a server that other machines can reach without a key, unless `no_auth` is set."""
    if no_auth and keys:
        raise UsageError("--no-auth contradicts the keys that are given.", hint=f"Unset {VARIABLE} and --api-key-file, or it.")
    if not (keys or no_auth or is_loopback(host)):
        raise UsageError(
            f"On --host {host} anyone who reaches this machine could ask, without a key.",
            hint=f"Give keys (--api-key-file, or {VARIABLE}), or say --no-auth.",
        )


def check_proxies(addresses: Sequence[str]) -> None:
    """Raise UsageError unless all are addresses or networks, such as 10.0.0.5 or 10.0.0.0/24."""
    for each in addresses:
        try:
            ipaddress.ip_network(each)
        except ValueError as error:
            # "*", which uvicorn knows, would let every client choose the name that its limits go by.
            raise UsageError(f"--forwarded-allow-ips {each} is no address.", hint="Name the proxy, such as 10.0.0.5.") from error


def check_origins(origins: Sequence[str]) -> None:
    """Raise UsageError unless all are origins as browsers write them (scheme://host[:port]), or "*"."""
    for each in origins:
        if each != "*" and not _ORIGIN.fullmatch(each):
            raise UsageError(f"--allow-origin {each} is no origin.", hint="Write it as https://example.com:8080, without a path.")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class AccessMiddleware:
    """The outermost layer of the server. `paths`: all paths. `public`: paths that need no key.

    `local`: accept only requests whose Host header names this machine. It protects a server on a loopback address from DNS
    rebinding, in which a page of another origin reaches the model through a name that resolves to this machine.
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
        """Pass one request to the application, or send an error response."""
        started, status = time.monotonic(), 0

        async def send_recorded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        scope["app"] = self  # makes Starlette's router raise for unknown paths instead of sending its own response
        try:
            scope[CLIENT] = self._client(scope)
            await self._app(scope, receive, send_recorded)
        except Exception as error:
            refusal = _as_api_error(error)
            self._server_metrics.rejected(refusal.reason)
            if status == 0:
                await error_response(refusal)(scope, receive, send_recorded)
        path, method = self._labels(scope)
        self._server_metrics.request(method, path, status)
        level = logging.DEBUG if path in _POLLED else logging.INFO
        _log.log(level, "%s %s %d %.0f ms", method, path, status, 1e3 * (time.monotonic() - started))

    def _client(self, scope: Scope) -> str:
        headers = Headers(scope=scope)
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy may read the other one and see two requests where this server sees one (RFC 9112, section 6.3).
            raise ambiguous_length()
        host = headers.get("host", "")
        name = host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]
        if self._local and not is_loopback(name):
            message = f"On a loopback address this server answers only to this machine's own names, as localhost, not to {name!r}."
            raise ApiError(403, "wrong_host", message)
        address = (scope.get("client") or ("unknown", 0))[0]
        if scope["path"] in self._public:
            return str(address)
        return self._keys.client(headers.get("authorization", "").encode("latin-1"), str(address))

    def _labels(self, scope: Scope) -> tuple[str, str]:
        path, method = scope["path"], scope["method"]
        path = "/v1/models" if path.startswith("/v1/models/") else path
        return (path if path in self._paths else "other"), (method if method in _METHODS else "other")


def error_response(refusal: ApiError) -> Response:
    """Return the HTTP response of an error."""
    return Response(json.dumps(refusal.body), refusal.status, refusal.headers, "application/json")


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EdgePruneError):
        return api_error_of(error)
    if isinstance(error, HTTPException):
        missing = error.status_code == 404
        return ApiError(error.status_code, "not_found" if missing else "not_allowed", f"{error.detail} on this path.")
    # Log the traceback without the message, which may contain part of a request.
    _log.error("%s in a request:\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return internal()
