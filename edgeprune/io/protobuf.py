"""Protobuf's wire format, read and written by hand: the onnx package is not among the runtime's dependencies.

A message is a sequence of fields. A field has a number, and is written as an integer of seven bits a byte, as four or eight bytes,
or as a length with so many bytes after it: a text, packed integers, or another message. Which number means what is for the caller
to know. Nothing is copied: what has a length is given as its place in the bytes.

The reader is strict, as it guards bundles: a field that outruns the message that holds it, or an integer of more than 64 bits, is
an error, and not read as well as can be.
"""

from __future__ import annotations

from collections.abc import Iterator

# The number of a field, its value if it is written as an integer, and begin and end of what it holds if it has a length. The end of
# anything else is 0, where no content can end: a field of the wrong kind can be told from an empty one.
Field = tuple[int, int, int, int]

_INTEGER, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_WIDTHS = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}
_OUTRUNS = "a field is longer than what holds it"


def read_fields(data: bytes, at: int, end: int) -> Iterator[Field]:
    """Yield the fields of the message from `at` to `end`; raise ValueError or IndexError where it is none."""
    while at < end:
        # Most tags have one byte: these are read here, without a call.
        tag = data[at]
        if tag < 128:
            at += 1
        else:
            tag, at = _read_integer(data, at)
        wire = tag & 7
        if wire == _LENGTH:
            length, at = _read_integer(data, at)
            begin, at = at, at + length
            if at > end:
                raise ValueError(_OUTRUNS)
            yield tag >> 3, 0, begin, at
        elif wire == _INTEGER:
            value, at = _read_integer(data, at)
            yield tag >> 3, value, 0, 0
        elif wire in _WIDTHS:
            at += _WIDTHS[wire]
            yield tag >> 3, 0, 0, 0
        else:
            raise ValueError(f"wire type {wire}")
    if at != end:
        raise ValueError(_OUTRUNS)


def read_integers(data: bytes, at: int, end: int) -> Iterator[int]:
    """Yield the integers that are packed from `at` to `end`; raise ValueError or IndexError where they end elsewhere."""
    while at < end:
        value, at = _read_integer(data, at)
        yield value
    if at != end:
        raise ValueError(_OUTRUNS)


def message(number: int, content: bytes) -> bytes:
    """Return a field that holds a message, a text or other bytes."""
    return _write_integer(number << 3 | _LENGTH) + _write_integer(len(content)) + content


def integers(number: int, *values: int) -> bytes:
    """Return a field for each of some integers, none of them below 0."""
    return b"".join(_write_integer(number << 3 | _INTEGER) + _write_integer(value) for value in values)


def _read_integer(data: bytes, at: int) -> tuple[int, int]:
    byte = data[at]
    if byte < 128:
        return byte, at + 1
    value, shift = 0, 0
    while byte & 128:
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if shift > 63:
            raise ValueError("a number is too long")
        byte = data[at]
    return value | byte << shift, at + 1


def _write_integer(value: int) -> bytes:
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes((*written, value))
