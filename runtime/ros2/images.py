"""Decode ROS image messages, of DDS or rclpy: both have the same fields.

sensor_msgs/Image: encoding, height, width, step (bytes per row, padding included), data. sensor_msgs/CompressedImage: format, data.
Raw pixels are not copied. The picture is a view of the message's data, which must not change.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from edgeprune.errors import ImageError
from edgeprune.runtime.media.frames import NV12
from edgeprune.runtime.media.images import MAX_PIXELS

# Channels of the message, and the indices of red, green and blue. Alpha is dropped, because cameras do not use it.
_CHANNELS = {"rgb8": (3, (0, 1, 2)), "bgr8": (3, (2, 1, 0)), "rgba8": (4, (0, 1, 2)), "bgra8": (4, (2, 1, 0))}
_GREY = ("mono8", "8UC1")
ENCODINGS = (*_CHANNELS, *_GREY, "nv12")
CODECS = ("JPEG", "PNG")

Picture = np.ndarray | NV12 | Image.Image


class ImageMessage(Protocol):
    """A sensor_msgs/Image of any library."""

    encoding: str
    height: int
    width: int
    step: int
    data: Any  # supports the buffer protocol


class CompressedImageMessage(Protocol):
    """A sensor_msgs/CompressedImage of any library."""

    format: str
    data: Any


def decode_image(message: ImageMessage) -> np.ndarray | NV12:
    """Return the picture of a sensor_msgs/Image: uint8 RGB [height, width, 3], grey [height, width], or NV12.

    Raises ImageError for an encoding outside ENCODINGS and for inconsistent sizes.
    """
    encoding, height, width, step = message.encoding, int(message.height), int(message.width), int(message.step)
    if encoding not in ENCODINGS:
        raise ImageError(f"Images of encoding {encoding[:40]!r} cannot be read.", hint=f"Known are: {', '.join(ENCODINGS)}.")
    name = f"An image of {width}x{height} ({encoding})"
    if height < 1 or width < 1:
        raise ImageError(f"{name} has no pixels.", hint="Set height and width.")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} has more than {MAX_PIXELS // 10**6} megapixels.", hint="Scale it down first.")
    if encoding == "nv12":
        return _nv12(name, height, width, _rows(message.data, name, height + height // 2, width, step))
    count, order = _CHANNELS.get(encoding, (1, ()))
    rows = _rows(message.data, name, height, width * count, step)
    if not order:
        return rows
    pixels = rows.reshape(height, width, count)
    return pixels[..., 2::-1] if order[0] else pixels[..., :3]


def decode_compressed(message: CompressedImageMessage) -> Image.Image:
    """Return the picture of a sensor_msgs/CompressedImage, JPEG or PNG. Only the header is read here; pixels are decoded on use.

    The codec is detected from the data, not from `format`. Raises ImageError for anything else.
    """
    data = bytes(message.data)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(BytesIO(data), formats=CODECS)
        except UnidentifiedImageError as error:
            about = f"format {message.format[:40]!r}, {len(data)} bytes"
            raise ImageError(f"A compressed image ({about}) is neither JPEG nor PNG.", hint="Depth images are not read.") from error
        except Exception as error:  # Pillow's decoders raise many types on damaged data
            raise ImageError(f"A compressed image cannot be read: {error}.", hint="It is damaged, or too large.") from error
    if picture.width * picture.height > MAX_PIXELS:
        raise ImageError(f"A compressed image has more than {MAX_PIXELS // 10**6} megapixels.", hint="Scale it down first.")
    return picture


def _rows(data: Any, name: str, rows: int, used: int, step: int) -> np.ndarray:
    # A view uint8 [rows, used] without the row padding.
    if step < used:
        raise ImageError(f"{name} has rows of {used} bytes, but its step is {step}.", hint="Set step to the bytes of a row.")
    octets = np.frombuffer(data, np.uint8)
    if len(octets) != rows * step:
        expected = f"{rows} rows of {step} bytes are {rows * step}"
        raise ImageError(f"{name} has {len(octets)} bytes of data, but {expected}.", hint="Send all rows, padding included.")
    return octets.reshape(rows, step)[:, :used]


def _nv12(name: str, height: int, width: int, rows: np.ndarray) -> NV12:
    if height % 2 or width % 2:
        raise ImageError(f"{name} has an odd side.", hint="NV12 has one colour for 2 x 2 pixels: both sides are even.")
    return NV12.from_planes(rows[:height], rows[height:])
