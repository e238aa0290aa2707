"""Decode ROS image messages, of DDS, rosbags or rclpy: all have the same fields.

sensor_msgs/Image: encoding, height, width, is_bigendian, step (bytes per row, padding included), data. sensor_msgs/CompressedImage:
format, data. Encodings are those of sensor_msgs/image_encodings.hpp that are pictures, with the meaning that cv_bridge and
image_proc give them, and nv12. Raw pixels are not copied. The picture is a view of the message's data, which must not change.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, Protocol

import numpy as np
from PIL import Image

from edgeprune.errors import ImageError
from edgeprune.runtime.media.bayer import PATTERNS, demosaic
from edgeprune.runtime.media.frames import NV12, RawFrame, YCbCr, scale_to_8_bits
from edgeprune.runtime.media.images import MAX_PIXELS, open_image

CODECS = ("JPEG", "PNG")

Picture = np.ndarray | YCbCr | RawFrame
_Convert = Callable[[np.ndarray], np.ndarray]
_NUMBERS = re.compile(r"(8|16|32|64)[USF](C[0-9]*)?")  # OpenCV's names of types, which say nothing of colour
_BGRA = [2, 1, 0, 3]


class ImageMessage(Protocol):
    """A sensor_msgs/Image of any library."""

    header: Any
    encoding: str
    height: int
    width: int
    is_bigendian: int
    step: int
    data: Any  # supports the buffer protocol


class CompressedImageMessage(Protocol):
    """A sensor_msgs/CompressedImage of any library."""

    header: Any
    format: str
    data: Any


@dataclass(frozen=True)
class _Layout:
    # Samples of a pixel, bytes of a sample, and what makes a picture of the samples [height, width, samples].
    samples: int
    picture: Callable[[np.ndarray], Picture]
    octets: int = 1


def _grey(pixels: np.ndarray) -> Picture:
    return pixels[..., 0]


def _colour(pixels: np.ndarray) -> Picture:
    return pixels


def _reversed_colour(pixels: np.ndarray) -> Picture:
    return pixels[..., ::-1]


def _converted(convert: _Convert) -> Callable[[np.ndarray], Picture]:
    return lambda pixels: RawFrame(pixels, convert)


def _bgra(pixels: np.ndarray) -> np.ndarray:
    rgba: np.ndarray = pixels[..., _BGRA]
    return rgba


def _demosaiced(pattern: str, pixels: np.ndarray) -> np.ndarray:
    rgb = demosaic(pixels[..., 0], pattern)
    return rgb if rgb.dtype == np.uint8 else scale_to_8_bits(rgb)


def _chroma_422(luma: int, pixels: np.ndarray) -> Picture:
    # Two bytes of a pixel: its luma at index `luma`, and Cb of even or Cr of odd columns.
    height, width, _ = pixels.shape
    if width % 2:
        raise ImageError(f"A YUV 4:2:2 image cannot be {width} pixels wide.", hint="Two pixels share a colour: the width is even.")
    return YCbCr(pixels[..., luma], pixels[..., 1 - luma].reshape(height, width // 2, 2))


_LAYOUTS = {
    "rgb8": _Layout(3, _colour),
    "bgr8": _Layout(3, _reversed_colour),
    "rgba8": _Layout(4, _colour),
    "bgra8": _Layout(4, _converted(_bgra)),
    "mono8": _Layout(1, _grey),
    "8UC1": _Layout(1, _grey),
    "8UC3": _Layout(3, _reversed_colour),
    "8UC4": _Layout(4, _converted(_bgra)),
    "mono16": _Layout(1, _converted(lambda pixels: scale_to_8_bits(pixels)[..., 0]), 2),
    "rgb16": _Layout(3, _converted(scale_to_8_bits), 2),
    "bgr16": _Layout(3, _converted(lambda pixels: scale_to_8_bits(pixels)[..., ::-1]), 2),
    "rgba16": _Layout(4, _converted(scale_to_8_bits), 2),
    "bgra16": _Layout(4, _converted(lambda pixels: _bgra(scale_to_8_bits(pixels))), 2),
    **dict.fromkeys(("uyvy", "yuv422"), _Layout(2, partial(_chroma_422, 1))),
    **dict.fromkeys(("yuyv", "yuv422_yuy2"), _Layout(2, partial(_chroma_422, 0))),
    **{f"bayer_{pattern}8": _Layout(1, _converted(partial(_demosaiced, pattern))) for pattern in PATTERNS},
    **{f"bayer_{pattern}16": _Layout(1, _converted(partial(_demosaiced, pattern)), 2) for pattern in PATTERNS},
}
_CHROMA_420 = {"nv12": 1, "nv21": -1}  # the order of (Cb, Cr)
ENCODINGS = (*_LAYOUTS, *_CHROMA_420)


def decode_image(message: ImageMessage) -> Picture:
    """Return the picture of a sensor_msgs/Image, for `read_image`: a uint8 array, or a frame that is converted on use.

    Raises ImageError for an encoding outside ENCODINGS and for inconsistent sizes.
    """
    encoding, height, width, step = message.encoding, int(message.height), int(message.width), int(message.step)
    if encoding not in ENCODINGS:
        raise _unknown(encoding)
    name = f"An image of {width}x{height} ({encoding})"
    if height < 1 or width < 1:
        raise ImageError(f"{name} has no pixels.", hint="Set height and width.")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} has more than {MAX_PIXELS // 10**6} megapixels.", hint="Scale it down first.")
    if encoding in _CHROMA_420:
        rows = _rows(message.data, name, height + height // 2, width, step)
        return _chroma_420(name, height, width, rows, _CHROMA_420[encoding])
    layout = _LAYOUTS[encoding]
    rows = _rows(message.data, name, height, width * layout.samples * layout.octets, step)
    if layout.octets == 2:
        rows = rows.view(">u2" if message.is_bigendian else "<u2")
    return layout.picture(rows.reshape(height, width, layout.samples))


def decode_compressed(message: CompressedImageMessage) -> Image.Image:
    """Return the picture of a sensor_msgs/CompressedImage, JPEG or PNG. Only the header is read here; pixels are decoded on use.

    The codec is detected from the data. Raises ImageError for anything else, and where `format` says that the pixels are depth.
    """
    pixels = message.format.partition(";")[0].strip()
    if "compressedDepth" in message.format or (_NUMBERS.fullmatch(pixels) and pixels not in ENCODINGS):
        raise _unknown(message.format)
    data = bytes(message.data)
    return open_image(BytesIO(data), f"the compressed image (format {message.format[:40]!r}, {len(data)} bytes)", CODECS)


def _unknown(encoding: str) -> ImageError:
    known = f"Known are: {', '.join(ENCODINGS)}."
    if _NUMBERS.match(encoding) or "compressedDepth" in encoding:
        known = f"Depth and other numbers are no picture: scale them to mono8 or mono16. {known}"
    return ImageError(f"Images of encoding {encoding[:40]!r} cannot be read.", hint=known)


def _rows(data: Any, name: str, rows: int, used: int, step: int) -> np.ndarray:
    # A view uint8 [rows, used] without the row padding.
    if step < used:
        raise ImageError(f"{name} has rows of {used} bytes, but its step is {step}.", hint="Set step to the bytes of a row.")
    octets = np.frombuffer(data, np.uint8)
    if len(octets) != rows * step:
        expected = f"{rows} rows of {step} bytes are {rows * step}"
        raise ImageError(f"{name} has {len(octets)} bytes of data, but {expected}.", hint="Send all rows, padding included.")
    return octets.reshape(rows, step)[:, :used]


def _chroma_420(name: str, height: int, width: int, rows: np.ndarray, order: int) -> YCbCr:
    if height % 2 or width % 2:
        raise ImageError(f"{name} has an odd side.", hint="It has one colour for 2 x 2 pixels: both sides are even.")
    frame = NV12.from_planes(rows[:height], rows[height:])
    return frame if order == 1 else YCbCr(frame.luma, frame.chroma[..., ::-1])
