"""The wire: names as ROS mangles them, and the bytes of every message, worked out by hand from the CDR rules."""

from __future__ import annotations

import pytest

pytest.importorskip("cyclonedds", reason="cyclonedds is not installed")

from cyclonedds.idl._support import Endianness

from edgeprune.runtime.ros2.messages import (
    CompressedImage,
    DiagnosticArray,
    DiagnosticStatus,
    Header,
    Image,
    KeyValue,
    String,
    Time,
)

HEADER = "00010000"  # plain CDR, little endian, no options
STAMP = "01000000 02000000"  # 1 s, 2 ns


def octets(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


# Every string: its length with the closing zero, its letters, the zero; then zeros up to the next multiple of 4 behind the header.
SAMPLES = [
    (String("hi"), f"{HEADER} 03000000 686900"),
    (String(""), f"{HEADER} 01000000 00"),
    (String("é"), f"{HEADER} 03000000 c3a900"),
    (
        Image(Header(Time(1, 2), "cam"), 2, 3, "mono8", 0, 4, b"abc\x00def\x00"),
        f"{HEADER} {STAMP} 04000000 63616d00"  # frame_id
        " 02000000 03000000"  # height, width
        " 06000000 6d6f6e6f3800"  # encoding
        " 00"  # is_bigendian, right behind it
        " 00 04000000"  # padding, step
        " 08000000 6162630064656600",
    ),
    (
        Image(Header(Time(-1, 999_999_999), ""), 1, 1, "rgb8", 1, 3, b"\x01\x02\x03"),
        f"{HEADER} ffffffff ffc99a3b 01000000 00 000000 01000000 01000000 05000000 7267623800 01 0000 03000000 03000000 010203",
    ),
    (
        CompressedImage(Header(Time(1, 2), "c"), "jpeg", b"\xff\xd8"),
        f"{HEADER} {STAMP} 02000000 6300 0000 05000000 6a70656700 000000 02000000 ffd8",
    ),
    (
        DiagnosticArray(
            Header(Time(1, 2), ""),
            [DiagnosticStatus(2, "n", "m", "", [KeyValue("a", "bcd"), KeyValue("e", "")]), DiagnosticStatus(0, "o", "", "", [])],
        ),
        f"{HEADER} {STAMP} 01000000 00 000000 02000000"  # two of them
        " 02 000000 02000000 6e00 0000 02000000 6d00 0000 01000000 00 000000 02000000"  # level, name, message, hardware_id
        " 02000000 6100 0000 04000000 62636400 02000000 6500 0000 01000000 00"
        " 00 0000 02000000 6f00 0000 01000000 00 000000 01000000 00 000000 00000000",
    ),
]


@pytest.mark.parametrize(("message", "expected"), SAMPLES, ids=lambda value: type(value).__name__)
def test_the_bytes_are_those_of_the_cdr_rules(message: object, expected: str) -> None:
    assert message.serialize() == octets(expected)  # type: ignore[attr-defined]
    assert type(message).deserialize(octets(expected)) == message  # type: ignore[attr-defined]


def test_images_of_big_endian_machines_are_read() -> None:
    image = Image(Header(Time(1, 2), "cam"), 2, 3, "mono8", 0, 4, b"abc\x00def\x00")
    swapped = image.serialize(endianness=Endianness.Big)
    assert swapped[:8] == octets("00000000 00000001")
    assert swapped[-12:] == octets("00000008 6162630064656600")
    assert Image.deserialize(swapped) == image


def test_the_data_of_an_image_is_not_copied() -> None:
    message = Image(data=bytes(1000)).serialize()
    assert Image.deserialize(message).data.obj is message


@pytest.mark.parametrize("length", [0, 3, 4, 11, 20, 40])
def test_an_image_that_is_cut_short_is_an_error(length: int) -> None:
    message = Image(Header(Time(1, 2), "cam"), 2, 3, "mono8", 0, 4, b"abc\x00def\x00").serialize()
    with pytest.raises(ValueError, match=r"too early|no CDR header"):
        Image.deserialize(message[:length])


def test_the_type_names_are_those_of_ros() -> None:
    names = {kind: kind.__idl__.idl_transformed_typename for kind in (Time, Header, String, Image, CompressedImage)}
    assert names == {
        Time: "builtin_interfaces::msg::dds_::Time_",
        Header: "std_msgs::msg::dds_::Header_",
        String: "std_msgs::msg::dds_::String_",
        Image: "sensor_msgs::msg::dds_::Image_",
        CompressedImage: "sensor_msgs::msg::dds_::CompressedImage_",
    }
    assert DiagnosticArray.__idl__.idl_transformed_typename == "diagnostic_msgs::msg::dds_::DiagnosticArray_"
    assert DiagnosticStatus.__idl__.idl_transformed_typename == "diagnostic_msgs::msg::dds_::DiagnosticStatus_"
    assert KeyValue.__idl__.idl_transformed_typename == "diagnostic_msgs::msg::dds_::KeyValue_"
