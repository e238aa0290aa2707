"""Errors in OpenAI's format with their HTTP status, and the limits of a server. An error names the option that sets its limit."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from edgeprune.errors import EdgePruneError, MissingExtraError, UsageError, one_line

_RETRY_S = 5.0  # Retry-After of temporary errors
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class ServerLimits:
    """The limits of requests and connections.

    `max_body_bytes`: size of one body. `max_pixels`: pixels of one image. `max_request_pixels`: of all images of one request,
    history included. `max_images`: their number. `queue`: requests that may wait in addition to those being answered. `per_client`:
    open requests of one client, waiting or being answered. `max_connections`: open connections; beyond them the one that is idle
    for longest is closed.
    """

    max_body_bytes: int = 32 << 20
    max_pixels: int = 20_000_000
    max_request_pixels: int = 60_000_000
    max_images: int = 16
    queue: int = 16
    per_client: int = 4
    max_connections: int = 256

    def __post_init__(self) -> None:
        for each in fields(self):
            minimum = 0 if each.name == "queue" else 1
            if getattr(self, each.name) < minimum:
                raise UsageError(f"--{each.name.replace('_', '-')} must be {minimum} or more, not {getattr(self, each.name)}.")


class ApiError(Exception):
    """A rejected or failed request: the HTTP `status`, a machine-readable `code`, and the invalid parameter `param`.

    `reason`: label in the metrics, by default `code`. `retry_after`: seconds until a retry makes sense, None for never. `closes`:
    the connection is closed after the response.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        reason: str | None = None,
        retry_after: float | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(one_line(message))
        self.status, self.code, self.message = status, code, str(self)
        self.param = None if param is None else one_line(param)
        self.reason = reason or code
        self.retry_after, self.closes = retry_after, closes

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON data."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the error response."""
        headers = {} if self.retry_after is None else {"retry-after": str(max(1, math.ceil(self.retry_after)))}
        headers |= {"www-authenticate": "Bearer"} if self.status == 401 else {}
        return headers | ({"connection": "close"} if self.closes else {})


def limit_exceeded(
    option: str, status: int, message: str, *, param: str | None = None, retry_after: float | None = None
) -> ApiError:
    """Return the error of a request that exceeds the limit set by `option`."""
    return ApiError(status, option.lstrip("-").replace("-", "_"), f"{message} ({option}).", param=param, retry_after=retry_after)


def api_error_of(error: EdgePruneError) -> ApiError:
    """Convert an error of the runtime: 400 for invalid requests, 501 for a missing extra, 500 otherwise."""
    if isinstance(error, UsageError):
        return ApiError(400, "invalid_request", str(error))
    if isinstance(error, MissingExtraError):
        return ApiError(501, "not_installed", str(error))
    return ApiError(500, "engine_error", str(error))


def ambiguous_length() -> ApiError:
    """Return the error of a request that says in two ways where it ends."""
    message = "The request has both Content-Length and Transfer-Encoding: send one of them."
    return ApiError(400, "ambiguous_length", message, closes=True)


def not_ready(phase: str) -> ApiError:
    """Return the error for requests that arrive before the model is loaded."""
    return ApiError(503, "not_ready", f"The model is not ready yet: it is {phase}.", retry_after=_RETRY_S)


def shutting_down() -> ApiError:
    """Return the error for requests during shutdown."""
    return ApiError(503, "shutting_down", "The server is shutting down.", retry_after=_RETRY_S)


def disconnected() -> ApiError:
    """Return the error of a request whose client disconnected. Only metrics and logs see it. Status 499 follows nginx."""
    return ApiError(499, "disconnected", "The client went away.")


def internal() -> ApiError:
    """Return the error of an unexpected exception. Details are only in the log."""
    return ApiError(500, "internal_error", "The server failed on this request; its log says where.")
