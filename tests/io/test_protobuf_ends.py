"""Where messages end: a field that reaches one byte beyond what holds it is refused, as protobuf refuses it."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto, TensorProto, helper

from edgeprune.bundle.integrity import external_locations
from edgeprune.errors import BundleError
from edgeprune.io.protobuf import integers, message, read_fields, read_integers

# Fields of every way to be written, numbered 100, which onnx.proto leaves free. The last byte of each is 8; as a tag it begins
# the model's own field 1, an integer, so that what follows the graph can be read with and without that byte.
LAST = {
    "varint": b"\xa0\x06" + b"\x80\x08",
    "eight bytes": b"\xa1\x06" + b"1234567\x08",
    "bytes": b"\xa2\x06" + b"\x03" + b"12\x08",
    "four bytes": b"\xa5\x06" + b"123\x08",
}
VERSION = b"\x08\x07"


def field(number: int, content: bytes, missing: int = 0) -> bytes:
    """Return a field with a length, which says less than there is by `missing` bytes."""
    return message(number, content[: len(content) - missing]) + content[len(content) - missing :]


def tensor() -> TensorProto:
    proto = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    proto.external_data.add(key="location", value="w.data")
    return proto


def graph(last: bytes) -> bytes:
    return bytes(helper.make_graph([], "g", [], [], [tensor()]).SerializeToString()) + last


def is_protobuf(data: bytes) -> bool:
    try:
        ModelProto.FromString(data)
    except DecodeError:
        return False
    return True


def found(folder: Path, data: bytes) -> set[str] | None:
    """Return the locations that are found in a file of these bytes, or None where it is refused."""
    (folder / "m.onnx").write_bytes(data)
    try:
        return external_locations(folder / "m.onnx")
    except BundleError as error:
        assert "no ONNX graph" in str(error)
        return None


@pytest.mark.parametrize("last", LAST)
def test_the_last_field_of_a_graph_ends_with_it(last: str, tmp_path: Path) -> None:
    whole = field(7, graph(LAST[last])) + VERSION
    assert is_protobuf(whole)
    assert found(tmp_path, whole) == {"w.data"}
    beyond = field(7, graph(LAST[last]), missing=1) + VERSION[1:]
    assert not is_protobuf(beyond)
    assert found(tmp_path, beyond) is None


@pytest.mark.parametrize("last", LAST)
def test_the_last_field_of_a_tensor_ends_with_it(last: str, tmp_path: Path) -> None:
    inside = tensor().SerializeToString() + LAST[last]
    whole = field(7, field(5, inside) + VERSION)
    assert is_protobuf(whole)
    assert found(tmp_path, whole) == {"w.data"}
    beyond = field(7, field(5, inside, missing=1) + VERSION[1:])
    assert not is_protobuf(beyond)
    assert found(tmp_path, beyond) is None


@pytest.mark.parametrize("last", LAST)
def test_the_last_field_of_an_entry_ends_with_it(last: str, tmp_path: Path) -> None:
    entry = b"\x0a\x08location\x12\x06w.data" + LAST[last]
    whole = field(7, field(5, field(13, entry) + VERSION))
    assert is_protobuf(whole)
    assert found(tmp_path, whole) == {"w.data"}
    beyond = field(7, field(5, field(13, entry, missing=1) + VERSION[1:]))
    assert not is_protobuf(beyond)
    assert found(tmp_path, beyond) is None


@pytest.mark.parametrize("last", LAST)
def test_the_last_field_of_a_file_is_whole(last: str, tmp_path: Path) -> None:
    whole = field(7, graph(b"")) + LAST[last]
    assert found(tmp_path, whole) == {"w.data"}
    for missing in range(1, len(LAST[last])):
        assert not is_protobuf(whole[:-missing])
        assert found(tmp_path, whole[:-missing]) is None, missing


@pytest.mark.parametrize("last", LAST)
def test_no_field_is_given_that_is_not_whole(last: str) -> None:
    # A reader may stop at the field that it looks for, and never come to the end.
    data = integers(1, 5) + LAST[last]
    assert len(list(read_fields(data, 0, len(data)))) == 2
    fields = read_fields(data, 0, len(data) - 1)
    assert next(fields) == (1, 5, 0, 0)
    if last == "bytes":
        with pytest.raises(ValueError, match="longer than what holds it"):
            next(fields)
    else:  # these hold no place in the bytes that could lead outside
        with pytest.raises(ValueError, match="longer than what holds it"):
            list(fields)


def test_packed_integers_end_with_their_field() -> None:
    packed = b"\x05\x80\x01\x07"  # 5, 128, 7
    assert list(read_integers(packed, 0, 4)) == [5, 128, 7]
    assert list(read_integers(packed, 0, 3)) == [5, 128]
    with pytest.raises(ValueError, match="longer than what holds it"):
        list(read_integers(packed, 0, 2))
