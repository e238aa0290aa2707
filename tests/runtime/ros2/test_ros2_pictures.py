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
    "bgra8": np.concatenate([PIXELS[..., ::-1], ALPHA], axis=2),
    "mono8": PIXELS[..., 0],
    "8UC1": PIXELS[..., 0],
    "nv12": np.concatenate([PIXELS[..., 0], PIXELS[:2, :, 1]]),
}


@dataclass
class Raw:
    encoding: str
    height: int
    width: int
    step: int
    data: Any


@dataclass
class Packed:
    format: str
    data: Any


def raw(encoding: str, padding: int = 0) -> Raw:
    rows = LAYERS[encoding].reshape(len(LAYERS[encoding]), -1)
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=255)
    return Raw(encoding, 4, 6, padded.shape[1], padded.tobytes())


def encoded(image: Image.Image, kind: str) -> bytes:
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_every_encoding_has_a_sample() -> None:
    assert set(LAYERS) == set(ENCODINGS)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8"])
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
        ({"encoding": "yuyv"}, "encoding 'yuyv'"),
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
        (b"", "neither JPEG nor PNG"),
        (b"not an image", "neither JPEG nor PNG"),
        (encoded(Image.fromarray(PIXELS), "BMP"), "neither JPEG nor PNG"),
        (encoded(Image.new("L", (8000, 7000)), "PNG"), "more than 50 megapixels"),
        (encoded(Image.new("1", (14000, 14000)), "PNG"), "cannot be read"),
    ],
)
def test_other_files_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        decode_compressed(Packed("jpeg", data))


def test_a_file_that_is_cut_short_is_refused_when_it_is_used() -> None:
    data = encoded(Image.fromarray(np.tile(PIXELS, (20, 20, 1))), "PNG")
    with pytest.raises(ImageError, match="It is damaged or cut short"):
        read_image(decode_compressed(Packed("png", data[: len(data) // 2])))
