"""Which files a graph reads its weights from: the `location` of every tensor with external data, found without the onnx package.

ONNX Runtime and TensorRT open whatever path stands there. A graph is a tree of protobuf messages, of which only the branches that
can hold a tensor are walked, and of those only the ones with the word "location" in them: the key that is looked for cannot stand
anywhere else. Sizes and offsets inside the files, and what the graph computes, are not looked at.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path, PurePosixPath

from edgeprune.errors import BundleError

# Of each message of onnx.proto that can hold a tensor: the fields that can, and what they are.
_FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2  # fields of an entry
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # how a field is written
_LOCATION = b"location"


def check_locations(folder: Path, graph: str, listed: Container[str]) -> None:
    """Raise BundleError unless every file that an ONNX graph reads weights from is `listed`, by its path in the folder."""
    beside = PurePosixPath(graph).parent
    for location in sorted(external_locations(folder / graph)):
        if (beside / location).as_posix() not in listed:
            raise BundleError(
                f"{graph} in {folder} reads its weights from {location!r}, which is no file of the bundle.",
                hint="Do not use it; export it again.",
            )


def external_locations(path: Path) -> set[str]:
    """Return the locations that the tensors of an ONNX file name, as they stand there; raise BundleError when it is none."""
    data = path.read_bytes()
    found, left = set[str](), [("model", 0, len(data))]
    try:
        while left:
            kind, begin, end = left.pop()
            if data.find(_LOCATION, begin, end) < 0:
                continue
            if kind == "entry":
                found |= _location(data, begin, end)
                continue
            held = _FIELDS[kind]
            left += [(held[number], first, last) for number, first, last in _parts(data, begin, end) if number in held]
    except (ValueError, IndexError) as error:
        raise BundleError(f"{path} is no ONNX graph that can be read: {error}.", hint="Export it again.") from error
    return found


def _location(data: bytes, begin: int, end: int) -> set[str]:
    # Of a field that is written twice the last counts, as in protobuf.
    entry = {number: data[first:last] for number, first, last in _parts(data, begin, end)}
    return {entry.get(_VALUE, b"").decode()} if entry.get(_KEY) == _LOCATION else set()


def _parts(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    # The fields with a length, as number, begin and end.
    while at < end:
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == _BYTES:
            length, at = _varint(data, at)
            if at + length > end:
                raise ValueError("a field is longer than what holds it")
            yield tag >> 3, at, at + length
            at += length
        elif wire == _VARINT:
            _, at = _varint(data, at)
        elif wire in (_EIGHT, _FOUR):
            at += 8 if wire == _EIGHT else 4
        else:
            raise ValueError(f"wire type {wire}")
    if at != end:
        raise ValueError("a field is longer than what holds it")


def _varint(data: bytes, at: int) -> tuple[int, int]:
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
