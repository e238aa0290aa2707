"""How much a server takes in. Every refusal names the limit by the option that sets it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from edgeprune.errors import UsageError


@dataclass(frozen=True)
class Limits:
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
