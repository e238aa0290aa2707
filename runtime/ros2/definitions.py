"""The node's ROS 2 messages for transports without types of their own: fields, CDR and type hashes, by rosbags.

The fields are those of ROS's .msg files (rcl_interfaces, common_interfaces) without comments and constants, which neither CDR nor a
hash contains. rosbags computes the hash (RIHS01, REP 2016) from the fields, so it says what is really read and written here.
"""

from __future__ import annotations

from typing import Any

from rosbags.typesys import Stores, get_types_from_msg, get_typestore

_FIELDS = {
    "builtin_interfaces/msg/Time": "int32 sec\nuint32 nanosec",
    "rosgraph_msgs/msg/Clock": "builtin_interfaces/Time clock",
    "std_msgs/msg/Header": "builtin_interfaces/Time stamp\nstring frame_id",
    "std_msgs/msg/String": "string data",
    "sensor_msgs/msg/Image": (
        "std_msgs/Header header\nuint32 height\nuint32 width\nstring encoding\nuint8 is_bigendian\nuint32 step\nuint8[] data"
    ),
    "sensor_msgs/msg/CompressedImage": "std_msgs/Header header\nstring format\nuint8[] data",
    "diagnostic_msgs/msg/KeyValue": "string key\nstring value",
    "diagnostic_msgs/msg/DiagnosticStatus": (
        "byte level\nstring name\nstring message\nstring hardware_id\ndiagnostic_msgs/KeyValue[] values"
    ),
    "diagnostic_msgs/msg/DiagnosticArray": "std_msgs/Header header\ndiagnostic_msgs/DiagnosticStatus[] status",
}

_STORE = get_typestore(Stores.EMPTY)  # a whole distribution's types take a second to load
for _name, _text in _FIELDS.items():
    _STORE.register(get_types_from_msg(_text, _name))


def message(kind: str, *fields: Any) -> Any:
    """Return a message of a type, such as "std_msgs/msg/String", with its fields in order."""
    return _STORE.types[kind](*fields)


def encode(message: Any) -> bytes:
    """Return a message as plain CDR, little endian, with its header of 4 bytes."""
    return bytes(_STORE.serialize_cdr(message, message.__msgtype__))


def decode(kind: str, data: bytes) -> Any:
    """Return the message that CDR bytes hold, with views of its bytes. Raises rosbags' SerdeError if they hold none."""
    return _STORE.deserialize_cdr(data, kind)


def type_hash(kind: str) -> str:
    """Return the hash of a type, such as RIHS01_df668c74..."""
    return _STORE.hash_rihs01(kind)
