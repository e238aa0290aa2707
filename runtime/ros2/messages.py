"""The node's ROS 2 messages as DDS types, and a reader for CDR, the serialization format of DDS.

Type names and fields are those that ROS's rmw layers use on the wire, in the field order of ROS's .msg files (rcl_interfaces,
common_interfaces): builtin_interfaces/Time, rosgraph_msgs/Clock, std_msgs/Header and String, sensor_msgs/Image and CompressedImage,
diagnostic_msgs/DiagnosticArray and its parts. ROS writes plain CDR (XCDR1), which aligns these types to at most 4 bytes.

This file has no `from __future__ import annotations`, because cyclonedds needs the annotations as objects.
"""

import struct
from dataclasses import dataclass, field, replace
from typing import Any

from cyclonedds.idl import IdlStruct
from cyclonedds.idl.annotations import autoid, final
from cyclonedds.idl.types import byte, int32, sequence, uint8, uint32


class CdrReader:
    """Reads the fields of a CDR message in order. Raises ValueError when the message is too short."""

    def __init__(self, message: bytes) -> None:
        if len(message) < 4:
            raise ValueError(f"A message of {len(message)} bytes has no CDR header.")
        self._order = "<" if message[1] & 1 else ">"
        self._body = memoryview(message)[4:]  # alignment is relative to the end of the header
        self._offset = 0

    def uint8(self) -> int:
        """Return an octet."""
        return self._take(1)[0]

    def int32(self) -> int:
        """Return a signed 4-byte integer."""
        return self._number("i")

    def uint32(self) -> int:
        """Return an unsigned 4-byte integer."""
        return self._number("I")

    def string(self) -> str:
        """Return a string. Invalid UTF-8 becomes replacement characters."""
        return bytes(self.octets()).removesuffix(b"\0").decode("utf-8", "replace")

    def octets(self) -> memoryview:
        """Return a view of a byte sequence with a length prefix."""
        return self._take(self.uint32())

    def _number(self, kind: str) -> int:
        self._offset += -self._offset % 4
        value: int = struct.unpack(self._order + kind, self._take(4))[0]
        return value

    def _take(self, count: int) -> memoryview:
        part = self._body[self._offset : self._offset + count]
        if len(part) < count:
            raise ValueError(f"A message ends {count - len(part)} bytes too early.")
        self._offset += count
        return part


@dataclass
@final
@autoid("sequential")
class Time(IdlStruct, typename="builtin_interfaces.msg.dds_.Time_"):  # type: ignore[call-arg, misc]
    """Seconds and nanoseconds."""

    sec: int32 = 0
    nanosec: uint32 = 0


@dataclass
@final
@autoid("sequential")
class Clock(IdlStruct, typename="rosgraph_msgs.msg.dds_.Clock_"):  # type: ignore[call-arg, misc]
    """The time of a simulation."""

    clock: Time = field(default_factory=Time)


@dataclass
@final
@autoid("sequential")
class Header(IdlStruct, typename="std_msgs.msg.dds_.Header_"):  # type: ignore[call-arg, misc]
    """Time stamp and coordinate frame."""

    stamp: Time = field(default_factory=Time)
    frame_id: str = ""


@dataclass
@final
@autoid("sequential")
class String(IdlStruct, typename="std_msgs.msg.dds_.String_"):  # type: ignore[call-arg, misc]
    """A string."""

    data: str = ""


@dataclass
@final
@autoid("sequential")
class Image(IdlStruct, typename="sensor_msgs.msg.dds_.Image_"):  # type: ignore[call-arg, misc]
    """Raw pixels, row by row. `data` supports the buffer protocol."""

    header: Header = field(default_factory=Header)
    height: uint32 = 0
    width: uint32 = 0
    encoding: str = ""
    is_bigendian: uint8 = 0
    step: uint32 = 0
    data: sequence[uint8] = b""

    def serialize(self, *arguments: Any, **options: Any) -> bytes:
        """Return the message as CDR bytes."""
        return _with_octets(self, self.data, *arguments, **options)

    @classmethod
    def deserialize(cls, data: bytes, *_: Any, **options: Any) -> "Image":
        """Parse CDR bytes. The message's data is a view of them."""
        read = CdrReader(data)
        header = _header(read)
        return cls(header, read.uint32(), read.uint32(), read.string(), read.uint8(), read.uint32(), read.octets())


@dataclass
@final
@autoid("sequential")
class CompressedImage(IdlStruct, typename="sensor_msgs.msg.dds_.CompressedImage_"):  # type: ignore[call-arg, misc]
    """The content of an image file. `data` supports the buffer protocol."""

    header: Header = field(default_factory=Header)
    format: str = ""
    data: sequence[uint8] = b""

    def serialize(self, *arguments: Any, **options: Any) -> bytes:
        """Return the message as CDR bytes."""
        return _with_octets(self, self.data, *arguments, **options)

    @classmethod
    def deserialize(cls, data: bytes, *_: Any, **options: Any) -> "CompressedImage":
        """Parse CDR bytes. The message's data is a view of them."""
        read = CdrReader(data)
        return cls(_header(read), read.string(), read.octets())


@dataclass
@final
@autoid("sequential")
class KeyValue(IdlStruct, typename="diagnostic_msgs.msg.dds_.KeyValue_"):  # type: ignore[call-arg, misc]
    """One named value."""

    key: str = ""
    value: str = ""


@dataclass
@final
@autoid("sequential")
class DiagnosticStatus(IdlStruct, typename="diagnostic_msgs.msg.dds_.DiagnosticStatus_"):  # type: ignore[call-arg, misc]
    """The status of one component. `level`: 0 is OK, 1 a warning, 2 an error, 3 stale."""

    level: byte = 0
    name: str = ""
    message: str = ""
    hardware_id: str = ""
    values: sequence[KeyValue] = field(default_factory=list)


@dataclass
@final
@autoid("sequential")
class DiagnosticArray(IdlStruct, typename="diagnostic_msgs.msg.dds_.DiagnosticArray_"):  # type: ignore[call-arg, misc]
    """The status of several components."""

    header: Header = field(default_factory=Header)
    status: sequence[DiagnosticStatus] = field(default_factory=list)


def _header(read: CdrReader) -> "Header":
    return Header(Time(read.int32(), read.uint32()), read.string())


def _with_octets(message: Any, octets: Any, *arguments: Any, **options: Any) -> bytes:
    # cyclonedds converts uint8[] to a list of ints, which takes seconds for a camera image. `data` is the last field: append it.
    empty: bytes = IdlStruct.serialize(replace(message, data=b""), *arguments, **options)
    order = "<" if empty[1] & 1 else ">"
    return b"".join((empty[:-4], struct.pack(order + "I", len(octets)), octets))
