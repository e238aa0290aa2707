"""Read CDR, the bytes of a DDS message, field by field."""

from __future__ import annotations

import struct


class CdrReader:
    """Reads what a message holds in the order of its fields. Raises ValueError where the bytes end too early."""

    def __init__(self, message: bytes) -> None:
        if len(message) < 4:
            raise ValueError(f"A message of {len(message)} bytes has no CDR header.")
        self._order = "<" if message[1] & 1 else ">"
        self._body = memoryview(message)[4:]  # alignment counts from behind the header
        self._at = 0

    def uint8(self) -> int:
        """Return an octet."""
        return self._take(1)[0]

    def int32(self) -> int:
        """Return a signed number of 4 bytes."""
        return self._number("i")

    def uint32(self) -> int:
        """Return an unsigned number of 4 bytes."""
        return self._number("I")

    def string(self) -> str:
        """Return a text; what is no UTF-8 in it becomes a replacement character."""
        return bytes(self.octets()).removesuffix(b"\0").decode("utf-8", "replace")

    def octets(self) -> memoryview:
        """Return a view on a counted run of bytes."""
        return self._take(self.uint32())

    def _number(self, kind: str) -> int:
        self._at += -self._at % 4
        value: int = struct.unpack(self._order + kind, self._take(4))[0]
        return value

    def _take(self, count: int) -> memoryview:
        part = self._body[self._at : self._at + count]
        if len(part) < count:
            raise ValueError(f"A message ends {count - len(part)} bytes too early.")
        self._at += count
        return part
