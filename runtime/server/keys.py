"""Who may ask: bearer keys, and what a request is known by in the queue."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from edgeprune.errors import UsageError
from edgeprune.runtime.server.refusals import Refusal

VARIABLE = "EDGEPRUNE_API_KEY"


class Keys:
    """The keys that are accepted; with none, everyone is. Only their digests are held."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def client(self, authorization: bytes | None, address: str) -> str:
        """Return the client's name: its key's number, or its address where there are no keys; raise Refusal (401)."""
        if not self._digests:
            return address
        scheme, _, key = (authorization or b"").partition(b" ")
        given = _digest(key.strip())
        # All are compared, each in constant time: how long it takes says nothing of which one was nearly right.
        found = [number for number, digest in enumerate(self._digests) if hmac.compare_digest(digest, given)]
        if scheme.lower() != b"bearer" or not found:
            message = "The key is missing or wrong: send 'Authorization: Bearer KEY'."
            raise Refusal(401, "invalid_api_key", message)
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


def check_exposure(host: str, keys: Keys, no_auth: bool) -> None:
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
