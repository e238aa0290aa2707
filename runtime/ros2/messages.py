"""The ROS 2 messages of this node as DDS types, and a reader of CDR, the serialization of DDS messages.

Names and fields are those that the rmw layers of ROS put on the wire: builtin_interfaces/Time, std_msgs/Header and String,
sensor_msgs/Image and CompressedImage, diagnostic_msgs/DiagnosticArray with its parts, in the field order of ROS's .msg files
(rcl_interfaces, common_interfaces). ROS writes plain CDR (XCDR1), whose alignment is never above 4 for these. cyclonedds reads
the annotations as objects, so this file does not postpone them.
"""

import struct
from dataclasses import dataclass, field, replace
from typing import Any

from cyclonedds.idl import IdlStruct
from cyclonedds.idl.annotations import autoid, final
from cyclonedds.idl.types import byte, int32, sequence, uint8, uint32


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
class Header(IdlStruct, typename="std_msgs.msg.dds_.Header_"):  # type: ignore[call-arg, misc]
    """When, and in which frame of reference."""

    stamp: Time = field(default_factory=Time)
    frame_id: str = ""


@dataclass
@final
@autoid("sequential")
class String(IdlStruct, typename="std_msgs.msg.dds_.String_"):  # type: ignore[call-arg, misc]
    """A text."""

    data: str = ""


@dataclass
@final
@autoid("sequential")
class Image(IdlStruct, typename="sensor_msgs.msg.dds_.Image_"):  # type: ignore[call-arg, misc]
    """Pixels, row by row; `data` is anything with a buffer of bytes."""

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
        """Return the message that CDR bytes hold; its data is a view on them."""
        read = CdrReader(data)
        header = _header(read)
        return cls(header, read.uint32(), read.uint32(), read.string(), read.uint8(), read.uint32(), read.octets())


@dataclass
@final
@autoid("sequential")
class CompressedImage(IdlStruct, typename="sensor_msgs.msg.dds_.CompressedImage_"):  # type: ignore[call-arg, misc]
    """The content of an image file; `data` is anything with a buffer of bytes."""

    header: Header = field(default_factory=Header)
    format: str = ""
    data: sequence[uint8] = b""

    def serialize(self, *arguments: Any, **options: Any) -> bytes:
        """Return the message as CDR bytes."""
        return _with_octets(self, self.data, *arguments, **options)

    @classmethod
    def deserialize(cls, data: bytes, *_: Any, **options: Any) -> "CompressedImage":
        """Return the message that CDR bytes hold; its data is a view on them."""
        read = CdrReader(data)
        return cls(_header(read), read.string(), read.octets())


@dataclass
@final
@autoid("sequential")
class KeyValue(IdlStruct, typename="diagnostic_msgs.msg.dds_.KeyValue_"):  # type: ignore[call-arg, misc]
    """One value and what it is called."""

    key: str = ""
    value: str = ""


@dataclass
@final
@autoid("sequential")
class DiagnosticStatus(IdlStruct, typename="diagnostic_msgs.msg.dds_.DiagnosticStatus_"):  # type: ignore[call-arg, misc]
    """How one component does. `level`: 0 is fine, 1 a warning, 2 an error, 3 stale."""

    level: byte = 0
    name: str = ""
    message: str = ""
    hardware_id: str = ""
    values: sequence[KeyValue] = field(default_factory=list)


@dataclass
@final
@autoid("sequential")
class DiagnosticArray(IdlStruct, typename="diagnostic_msgs.msg.dds_.DiagnosticArray_"):  # type: ignore[call-arg, misc]
    """How some components do."""

    header: Header = field(default_factory=Header)
    status: sequence[DiagnosticStatus] = field(default_factory=list)


def _header(read: CdrReader) -> "Header":
    return Header(Time(read.int32(), read.uint32()), read.string())


def _with_octets(message: Any, octets: Any, *arguments: Any, **options: Any) -> bytes:
    # cyclonedds makes a list of ints of uint8[], seconds for a camera's image; `data` is the last field and goes as it is.
    empty: bytes = IdlStruct.serialize(replace(message, data=b""), *arguments, **options)
    order = "<" if empty[1] & 1 else ">"
    return b"".join((empty[:-4], struct.pack(order + "I", len(octets)), octets))
