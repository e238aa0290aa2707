"""Errors in OpenAI's shape with their HTTP status, and the limits of a server. An error names the option that sets its limit."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from edgeprune.errors import EdgePruneError, MissingExtraError, UsageError, one_line

_SOON_S = 5.0  # after which to try again what is not there now
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class ServerLimits:
    """The bounds of requests.

    `max_body_bytes`: of one request's body. `max_pixels`: of one image. `max_images`: of one request, its history included.
    `queue`: requests that may wait besides those that are answered. `per_client`: requests of one client that may be open at once,
    waiting or answered.
    """

    max_body_bytes: int = 32 << 20
    max_pixels: int = 20_000_000
    max_images: int = 16
    queue: int = 16
    per_client: int = 4

    def __post_init__(self) -> None:
        for each in fields(self):
            least = 0 if each.name == "queue" else 1
            if getattr(self, each.name) < least:
                raise UsageError(f"--{each.name.replace('_', '-')} must be {least} or more, not {getattr(self, each.name)}.")


class ApiError(Exception):
    """A request that gets no answer: the HTTP `status`, a `code` for programs, and the `param` of the request that is wrong.

    `reason`: the word under which it is counted. `retry_after`: seconds after which to ask again, None for never.
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
    ) -> None:
        super().__init__(one_line(message))
        self.status, self.code, self.message = status, code, str(self)
        self.param = None if param is None else one_line(param)
        self.reason = reason or code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON data."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with it."""
        headers = {} if self.retry_after is None else {"retry-after": str(max(1, math.ceil(self.retry_after)))}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def limit_exceeded(
    option: str, status: int, message: str, *, param: str | None = None, retry_after: float | None = None
) -> ApiError:
    """Return the refusal of a request that is over the limit which `option` sets."""
    return ApiError(status, option.lstrip("-").replace("-", "_"), f"{message} ({option}).", param=param, retry_after=retry_after)


def api_error_of(error: EdgePruneError) -> ApiError:
    """Return what a client is told of an error of the runtime: its own mistake is 400, ours is 500."""
    if isinstance(error, UsageError):
        return ApiError(400, "invalid_request", str(error))
    if isinstance(error, MissingExtraError):
        return ApiError(501, "not_installed", str(error))
    return ApiError(500, "engine_error", str(error))


def not_ready(phase: str) -> ApiError:
    """Return what a client is told while there is no model yet."""
    return ApiError(503, "not_ready", f"The model is not ready yet: it is {phase}.", retry_after=_SOON_S)


def shutting_down() -> ApiError:
    """Return what a client is told once the server is to end."""
    return ApiError(503, "shutting_down", "The server is shutting down.", retry_after=_SOON_S)


def disconnected() -> ApiError:
    """Return what nobody will read: the client went away. The status is nginx's."""
    return ApiError(499, "disconnected", "The client went away.")


def internal() -> ApiError:
    """Return what a client is told of a bug; what happened stands in the log."""
    return ApiError(500, "internal_error", "The server failed on this request; its log says where.")
