"""Image messages of ROS as pictures. No DDS and no rclpy here: both kinds of message have these fields.

sensor_msgs/Image: encoding, height, width, step (bytes of a row with its padding), data. sensor_msgs/CompressedImage: format, data.
Pixels are not copied: the picture is a view on the message's data, which must stay as it is.
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

# The channels of the picture, as places among those of the message. Alpha is left out: a camera has none.
_CHANNELS = {"rgb8": (3, (0, 1, 2)), "bgr8": (3, (2, 1, 0)), "rgba8": (4, (0, 1, 2)), "bgra8": (4, (2, 1, 0))}
_GREY = ("mono8", "8UC1")
ENCODINGS = (*_CHANNELS, *_GREY, "nv12")
CODECS = ("JPEG", "PNG")

Picture = np.ndarray | NV12 | Image.Image


class ImageMessage(Protocol):
    """A sensor_msgs/Image, of whatever library."""

    encoding: str
    height: int
    width: int
    step: int
    data: Any  # anything with a buffer of bytes


class CompressedImageMessage(Protocol):
    """A sensor_msgs/CompressedImage, of whatever library."""

    format: str
    data: Any


def decode_image(message: ImageMessage) -> np.ndarray | NV12:
    """Return the picture of a sensor_msgs/Image: uint8 [height, width, 3], grey [height, width], or NV12.

    Raises ImageError for an encoding that is not among ENCODINGS and for sizes that contradict each other.
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
    """Return the picture of a sensor_msgs/CompressedImage, JPEG or PNG. Only its header is read here, the rest when it is used.

    The data says what it is; `format` is not trusted. Raises ImageError for anything else.
    """
    data = bytes(message.data)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(BytesIO(data), formats=CODECS)
        except UnidentifiedImageError as error:
            shown = f"format {message.format[:40]!r}, {len(data)} bytes"
            raise ImageError(f"A compressed image ({shown}) is neither JPEG nor PNG.", hint="Depth images are not read.") from error
        except Exception as error:  # on damaged data, Pillow's decoders raise nearly anything
            raise ImageError(f"A compressed image cannot be read: {error}.", hint="It is damaged, or too large.") from error
    if picture.width * picture.height > MAX_PIXELS:
        raise ImageError(f"A compressed image has more than {MAX_PIXELS // 10**6} megapixels.", hint="Scale it down first.")
    return picture


def _rows(data: Any, name: str, rows: int, used: int, step: int) -> np.ndarray:
    # uint8 [rows, used]: the padding behind each row is cut off.
    if step < used:
        raise ImageError(f"{name} has rows of {used} bytes, but its step is {step}.", hint="Set step to the bytes of a row.")
    octets = np.frombuffer(data, np.uint8)
    if len(octets) != rows * step:
        wanted = f"{rows} rows of {step} bytes are {rows * step}"
        raise ImageError(f"{name} has {len(octets)} bytes of data, but {wanted}.", hint="Send all rows, padding included.")
    return octets.reshape(rows, step)[:, :used]


def _nv12(name: str, height: int, width: int, rows: np.ndarray) -> NV12:
    if height % 2 or width % 2:
        raise ImageError(f"{name} has an odd side.", hint="NV12 has one colour for 2 x 2 pixels: both sides are even.")
    return NV12.from_planes(rows[:height], rows[height:])
