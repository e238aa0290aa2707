"""Reader and writer for the protobuf wire format. The runtime does not depend on the onnx package.

A message is a sequence of fields. A field has a number and one of these encodings: varint, four or eight bytes, or length-delimited
(a string, packed integers or another message). The caller knows the meaning of each number. Nothing is copied: a length-delimited
field is given by its offsets.

The reader is strict because it guards bundles: it rejects fields that extend beyond their message and integers above 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

# Field number, value of a varint, and begin and end offsets of length-delimited content. The end is 0 for every other encoding;
# content never ends at 0, so an empty field differs from one of another encoding.
Field = tuple[int, int, int, int]

_INTEGER, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_WIDTHS = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}
_OUTRUNS = "a field is longer than what holds it"


def read_fields(data: bytes, at: int, end: int) -> Iterator[Field]:
    """Yield the fields of the message in `data[at:end]`; raise ValueError or IndexError if it is malformed."""
    while at < end:
        # Fast path without a call: most tags have one byte.
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
    """Yield the packed integers in `data[at:end]`; raise ValueError or IndexError if they are malformed."""
    while at < end:
        value, at = _read_integer(data, at)
        yield value
    if at != end:
        raise ValueError(_OUTRUNS)


def message(number: int, content: bytes) -> bytes:
    """Return an encoded length-delimited field: a message, a string or bytes."""
    return _write_integer(number << 3 | _LENGTH) + _write_integer(len(content)) + content


def integers(number: int, *values: int) -> bytes:
    """Return one encoded varint field per integer. Integers must not be negative."""
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
