"""Image messages become pictures: every encoding, padding, and what is wrong with the others."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeprune.errors import ImageError
from edgeprune.runtime.media.frames import NV12
from edgeprune.runtime.media.images import read_image
from edgeprune.runtime.ros2.images import ENCODINGS, decode_compressed, decode_image

PIXELS = np.random.default_rng(3).integers(0, 256, (4, 6, 3), np.uint8)
ALPHA = np.full((4, 6, 1), 7, np.uint8)
LAYERS = {
    "rgb8": PIXELS,
    "bgr8": PIXELS[..., ::-1],
    "rgba8": np.concatenate([PIXELS, ALPHA], axis=2),
    "mono8": PIXELS[..., 0],
    "8UC1": PIXELS[..., 0],
    "nv12": np.concatenate([PIXELS[..., 0], PIXELS[:2, :, 1]]),
}
# What OpenCV's cvtColor, which cv_bridge and image_proc call, makes of these pixels.
MOSAIC = np.array([[0, 1, 4, 9, 16], [25, 36, 49, 64, 81], [100, 121, 144, 169, 196], [225, 0, 33, 68, 105]], np.uint8)
DEMOSAICED = {
    "rggb": [[62, 49, 36], [74, 49, 50], [90, 77, 64], [122, 121, 18], [144, 93, 42], [170, 169, 66]],
    "bggr": [[36, 49, 62], [50, 49, 74], [64, 77, 90], [18, 121, 122], [42, 93, 144], [66, 169, 170]],
    "gbrg": [[37, 36, 61], [49, 62, 75], [65, 64, 89], [83, 70, 121], [41, 144, 145], [67, 118, 169]],
    "grbg": [[61, 36, 37], [75, 62, 49], [89, 64, 65], [121, 70, 83], [145, 144, 41], [169, 118, 67]],
}
UYVY = np.array(
    [[[90, 60], [240, 180], [128, 16], [128, 235]], [[20, 100], [200, 120], [110, 81], [90, 41]]], np.uint8
)  # (chroma, luma)
FROM_UYVY = [[[230, 0, 0], [255, 115, 114], [0, 0, 0], [255] * 3], [[213, 81, 0], [236, 105, 0], [15, 114, 39], [0, 67, 0]]]
NV = np.array([[60, 180, 16, 235], [100, 120, 81, 41], [90, 240, 128, 128]], np.uint8)
GREYS = [[76] * 3, [29] * 3]
FROM_NV12 = [[[230, 0, 0], [255, 115, 114], [0, 0, 0], [255] * 3], [[255, 22, 21], [255, 45, 44], *GREYS]]
FROM_NV21 = [[[0, 38, 255], [130, 178, 255], [0, 0, 0], [255] * 3], [[37, 85, 255], [60, 108, 255], *GREYS]]
# The names of sensor_msgs/image_encodings.hpp that are not read: numbers, and nv24.
UNREAD = [f"{bits}C{count}" for bits in ("8S", "16U", "16S", "32S", "32F", "64F") for count in (1, 2, 3, 4)] + ["8UC2", "nv24"]


@dataclass
class Raw:
    encoding: str
    height: int
    width: int
    step: int
    data: Any
    is_bigendian: int = 0
    header: Any = None


@dataclass
class Packed:
    format: str
    data: Any
    header: Any = None


def raw(encoding: str, padding: int = 0) -> Raw:
    return message(encoding, LAYERS[encoding], 4, 6, padding)


def message(encoding: str, pixels: np.ndarray, height: int, width: int, padding: int = 0) -> Raw:
    rows = np.frombuffer(pixels.tobytes(), np.uint8).reshape(len(pixels), -1)
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=255)
    return Raw(encoding, height, width, padded.shape[1], padded.tobytes())


def pixels_of(message: Raw) -> np.ndarray:
    return np.asarray(read_image(decode_image(message)))


def encoded(image: Image.Image, kind: str) -> bytes:
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("pattern", DEMOSAICED)
def test_bayer_equals_opencv(pattern: str, padding: int) -> None:
    rows = np.array(DEMOSAICED[pattern], np.uint8).reshape(2, 3, 3)
    expected = rows[[0, 0, 1, 1]][:, [0, 0, 1, 2, 2]]  # the outermost repeat the next ones
    np.testing.assert_array_equal(pixels_of(message(f"bayer_{pattern}8", MOSAIC, 4, 5, padding)), expected)


@pytest.mark.parametrize("order", ["<", ">"])
def test_bayer_of_16_bits_is_interpolated_before_it_is_scaled(order: str) -> None:
    deep = (MOSAIC.astype(np.uint16) * 259 + 7).astype(f"{order}u2")
    sent = message("bayer_grbg16", deep, 4, 5, padding=3)
    sent.is_bigendian = order == ">"
    expected = np.rint(np.array([[15806, 9331, 9590], [19432, 16065, 12698], [23058, 16583, 16842]]) / 257)  # OpenCV's, scaled
    np.testing.assert_array_equal(pixels_of(sent)[0, 1:4], expected)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    ("encoding", "pixels", "expected"),
    [
        ("uyvy", UYVY, FROM_UYVY),
        ("yuv422", UYVY, FROM_UYVY),
        ("yuyv", UYVY[..., ::-1], FROM_UYVY),
        ("yuv422_yuy2", UYVY[..., ::-1], FROM_UYVY),
        ("nv12", NV, FROM_NV12),
        ("nv21", NV, FROM_NV21),
    ],
)
def test_yuv_equals_opencv(encoding: str, pixels: np.ndarray, expected: list[Any], padding: int) -> None:
    sent = message(encoding, pixels, 2, 4, padding)
    assert np.abs(pixels_of(sent).astype(int) - expected).max() <= 1  # OpenCV's integers round otherwise
    assert np.array_equal(np.asarray(read_image(decode_image(sent).copy())), pixels_of(sent))


def test_every_encoding_of_ros_is_read_or_refused_by_name() -> None:
    assert len(ENCODINGS) == len(set(ENCODINGS)) == 27
    assert not set(UNREAD) & set(ENCODINGS)
    for encoding in UNREAD:
        with pytest.raises(ImageError, match=f"Images of encoding '{encoding}' cannot be read") as caught:
            decode_image(Raw(encoding, 1, 1, 8, bytes(8)))
        assert all(name in caught.value.hint for name in ENCODINGS)
        assert ("Depth and other numbers are no picture" in caught.value.hint) is (encoding != "nv24")


@pytest.mark.parametrize(
    "format", ["16UC1; compressedDepth", "32FC1; compressedDepth png", "16UC1; compressedDepth rvl", "16UC1; png compressed "]
)
def test_compressed_depth_is_refused_by_name(format: str) -> None:
    data = encoded(Image.fromarray(np.full((4, 6), 900, np.uint16)), "PNG")
    with pytest.raises(ImageError, match=f"Images of encoding '{format}' cannot be read. Depth"):
        decode_compressed(Packed(format, data))
    assert read_image(decode_compressed(Packed("mono16; png compressed ", data))).getpixel((0, 0)) == (4, 4, 4)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8"])
def test_colours_come_out_as_they_were(encoding: str, padding: int) -> None:
    picture = decode_image(raw(encoding, padding))
    assert isinstance(picture, np.ndarray)
    assert np.array_equal(picture, PIXELS)
    assert np.array_equal(np.asarray(read_image(picture)), PIXELS)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("encoding", ["mono8", "8UC1"])
def test_grey_stays_grey(encoding: str, padding: int) -> None:
    picture = decode_image(raw(encoding, padding))
    assert np.array_equal(np.asarray(picture), PIXELS[..., 0])


def test_a_bayer_image_without_neighbours_is_refused() -> None:
    with pytest.raises(ImageError, match="Give 3x3 pixels or more"):
        pixels_of(message("bayer_rggb8", MOSAIC[:2], 2, 5))


@pytest.mark.parametrize("padding", [0, 2])
def test_nv12_keeps_its_planes(padding: int) -> None:
    picture = decode_image(raw("nv12", padding))
    assert isinstance(picture, NV12)
    assert np.array_equal(picture.luma, PIXELS[..., 0])
    assert np.array_equal(picture.chroma.reshape(2, 6), PIXELS[:2, :, 1])
    assert read_image(picture).size == (6, 4)


def test_pixels_are_not_copied_and_arrays_are_taken() -> None:
    message = raw("bgr8")
    message.data = array("B", message.data)  # what rclpy gives
    picture = decode_image(message)
    assert isinstance(picture, np.ndarray)
    message.data[2] ^= 255
    assert picture[0, 0, 0] == PIXELS[0, 0, 0] ^ 255


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoding": "yuyv", "width": 5, "step": 18}, "5 pixels wide"),
        ({"encoding": "mono16", "step": 11}, "rows of 12 bytes, but its step is 11"),
        ({"encoding": ""}, "encoding ''"),
        ({"height": 0}, "has no pixels"),
        ({"width": 0}, "has no pixels"),
        ({"width": 100_000, "height": 100_000}, "more than 50 megapixels"),
        ({"step": 17}, "rows of 18 bytes, but its step is 17"),
        ({"step": 0}, "step is 0"),
        ({"height": 5}, "72 bytes of data, but 5 rows of 18 bytes are 90"),
        ({"data": b""}, "0 bytes of data"),
        ({"data": bytes(73)}, "73 bytes of data"),
        ({"encoding": "nv12", "width": 5, "data": bytes(108)}, "odd side"),
        ({"encoding": "nv12", "height": 3, "data": bytes(72)}, "odd side"),
        ({"encoding": "nv12"}, "6 rows of 18 bytes are 108"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(changes: dict[str, Any], words: str) -> None:
    message = raw("rgb8")
    for name, value in changes.items():
        setattr(message, name, value)
    with pytest.raises(ImageError, match=words):
        decode_image(message)


def test_files_are_read_whatever_their_format_says() -> None:
    image = Image.fromarray(PIXELS)
    assert np.array_equal(np.asarray(read_image(decode_compressed(Packed("rgb8; png compressed", encoded(image, "PNG"))))), PIXELS)
    packed = decode_compressed(Packed("", array("B", encoded(image, "JPEG"))))
    assert np.array_equal(np.asarray(read_image(packed)), np.asarray(Image.open(BytesIO(encoded(image, "JPEG")))))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "Known are: JPEG, PNG"),
        (b"not an image", "Known are: JPEG, PNG"),
        (encoded(Image.fromarray(PIXELS), "BMP"), "Known are: JPEG, PNG"),
        (encoded(Image.new("L", (8000, 7000)), "PNG"), "more than 50 megapixels"),
        (encoded(Image.new("1", (14000, 14000)), "PNG"), "more than 50 megapixels"),
    ],
)
def test_other_files_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        decode_compressed(Packed("jpeg", data))


def test_a_file_that_is_cut_short_is_refused_when_it_is_used() -> None:
    data = encoded(Image.fromarray(np.tile(PIXELS, (20, 20, 1))), "PNG")
    with pytest.raises(ImageError, match="It is damaged or cut short"):
        read_image(decode_compressed(Packed("png", data[: len(data) // 2])))
