"""One picture has the same pixels on every way in: files, bytes, Pillow images, arrays, data URLs and ROS messages."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgeprune.errors import ImageError
from edgeprune.runtime.media.images import read_image
from edgeprune.runtime.ros2.images import decode_compressed, decode_image

HEIGHT, WIDTH = 6, 8
RGBA = np.random.default_rng(5).integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8)
RGB, GREY = np.ascontiguousarray(RGBA[..., :3]), np.ascontiguousarray(RGBA[..., 0])
DEEP = np.random.default_rng(6).integers(0, 65536, (HEIGHT, WIDTH), np.uint16)
BITS = np.where(GREY > 99, 255, 0).astype(np.uint8)
PALETTE = np.random.default_rng(7).integers(0, 256, (256, 3), np.uint8)


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[..., None], 3, axis=2)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None].astype(np.float64) / 255
    rounded: np.ndarray = np.rint(share * colour + (1 - share) * 255).astype(np.uint8)
    return rounded


def palette_image() -> Image.Image:
    image = Image.frombytes("P", (WIDTH, HEIGHT), GREY.tobytes())
    image.putpalette(PALETTE.tobytes())
    return image


# A Pillow image as it is saved, options of saving, and the pixels that everybody has to see.
PICTURES: dict[str, tuple[Callable[[], Image.Image], dict[str, Any], np.ndarray]] = {
    "1": (lambda: Image.fromarray(BITS).convert("1"), {}, grey(BITS)),
    "L": (lambda: Image.fromarray(GREY), {}, grey(GREY)),
    "L key": (lambda: Image.fromarray(GREY), {"transparency": int(GREY[0, 0])}, grey(np.where(GREY[0, 0] == GREY, 255, GREY))),
    "LA": (lambda: Image.fromarray(RGBA[..., [0, 3]]), {}, on_white(grey(GREY), RGBA[..., 3])),
    "P": (palette_image, {}, PALETTE[GREY]),
    "P key": (
        palette_image,
        {"transparency": int(GREY[1, 1])},
        np.where((GREY[1, 1] == GREY)[..., None], 255, PALETTE[GREY]).astype(np.uint8),
    ),
    "P alpha": (palette_image, {"transparency": bytes(range(256))}, on_white(PALETTE[GREY], GREY)),
    "RGB": (lambda: Image.fromarray(RGB), {}, RGB),
    "RGB key": (
        lambda: Image.fromarray(RGB),
        {"transparency": tuple(map(int, RGB[2, 3]))},
        np.where((RGB[2, 3] == RGB).all(axis=2, keepdims=True), 255, RGB).astype(np.uint8),
    ),
    "RGBA": (lambda: Image.fromarray(RGBA), {}, on_white(RGB, RGBA[..., 3])),
    "I;16": (lambda: Image.fromarray(DEEP), {}, grey(np.rint(DEEP / 257).astype(np.uint8))),
    "I;16 key": (
        lambda: Image.fromarray(DEEP),
        {"transparency": int(DEEP[0, 0])},
        grey(np.where(DEEP[0, 0] == DEEP, 255, np.rint(DEEP / 257)).astype(np.uint8)),
    ),
}


def png(name: str) -> bytes:
    make, options, _ = PICTURES[name]
    file = BytesIO()
    make().save(file, "PNG", **options)
    return file.getvalue()


def file_ways(data: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    path.write_bytes(data)
    yield from (("path", path), ("text path", str(path)), ("bytes", data), ("bytearray", bytearray(data)))
    yield from (("memoryview", memoryview(data)), ("BytesIO", BytesIO(data)))
    with path.open("rb") as file:
        yield "open file", file
    with Image.open(path) as opened:
        yield "opened Pillow image", opened
        yield "loaded Pillow image", opened.copy()
    yield "compressed message", decode_compressed(SimpleNamespace(format="jpeg", data=data, header=None))


def url_ways(data: bytes) -> Iterator[tuple[str, Any]]:
    pytest.importorskip("pydantic", reason="the server's packages are not installed")
    from edgeprune.runtime.server.request_mapping import EncodedImage

    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    yield "data URL", EncodedImage.from_url(url, 10**6, "messages[0]").decode(10**6)


def differences(expected: np.ndarray, ways: Iterator[tuple[str, Any]]) -> list[str]:
    return [name for name, source in ways if not np.array_equal(np.asarray(read_image(source)), expected)]


@pytest.mark.parametrize("name", PICTURES)
def test_files_of_every_mode(name: str, tmp_path: Path) -> None:
    expected = PICTURES[name][2]
    assert differences(expected, file_ways(png(name), tmp_path / "image.png")) == []
    assert differences(expected, url_ways(png(name))) == []


@pytest.mark.parametrize(("mode", "pixels"), [("L", GREY), ("RGB", RGB), ("RGBA", RGBA)])
def test_arrays_and_tensors(mode: str, pixels: np.ndarray) -> None:
    ways = [("array", pixels), ("strided array", np.repeat(pixels, 2, axis=1)[:, ::2]), ("tensor", torch.from_numpy(pixels))]
    assert differences(PICTURES[mode][2], iter(ways)) == []


MESSAGES = {
    "mono8": ("L", GREY),
    "8UC1": ("L", GREY),
    "rgb8": ("RGB", RGB),
    "bgr8": ("RGB", RGB[..., ::-1]),
    "8UC3": ("RGB", RGB[..., ::-1]),
    "rgba8": ("RGBA", RGBA),
    "bgra8": ("RGBA", RGBA[..., [2, 1, 0, 3]]),
    "8UC4": ("RGBA", RGBA[..., [2, 1, 0, 3]]),
    "mono16": ("I;16", DEEP),
    "rgb16": ("RGB", RGB.astype(np.uint16) * 257),
    "bgr16": ("RGB", RGB[..., ::-1].astype(np.uint16) * 257),
    "rgba16": ("RGBA", RGBA.astype(np.uint16) * 257),
    "bgra16": ("RGBA", RGBA[..., [2, 1, 0, 3]].astype(np.uint16) * 257),
}


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", MESSAGES)
def test_ros_messages(encoding: str, padding: int) -> None:
    name, pixels = MESSAGES[encoding]
    for big in (False, True):
        stored = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<"))
        rows = np.frombuffer(stored.tobytes(), np.uint8).reshape(HEIGHT, -1)
        padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=99)
        message = SimpleNamespace(
            encoding=encoding,
            height=HEIGHT,
            width=WIDTH,
            step=padded.shape[1],
            is_bigendian=int(big),
            data=padded.tobytes(),
            header=None,
        )
        np.testing.assert_array_equal(np.asarray(read_image(decode_image(message))), PICTURES[name][2])


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV", "RGBX"])
def test_other_colour_spaces_are_converted_as_pillow_converts_them(mode: str, tmp_path: Path) -> None:
    image = Image.frombytes(mode, (4, 4), RGBA.tobytes()[: 16 * len(Image.new(mode, (1, 1)).getbands())])
    ways = [("in memory", image)]
    if mode in ("CMYK", "YCbCr", "LAB"):
        image.save(tmp_path / "image.tif")
        ways.append(("file", tmp_path / "image.tif"))  # type: ignore[arg-type]
    assert differences(np.asarray(image.convert("RGB")), iter(ways)) == []


@pytest.mark.parametrize(("mode", "plain"), [("RGBa", "RGBA"), ("La", "LA"), ("PA", "RGBA")])
def test_rare_forms_of_alpha_are_laid_on_white(mode: str, plain: str) -> None:
    image = Image.fromarray(RGBA[..., [0, 3]] if plain == "LA" else RGBA).convert(mode)
    back = np.asarray(image.convert(plain).convert("RGBA"))
    assert differences(on_white(back[..., :3], back[..., 3]), iter([(mode, image)])) == []


@pytest.mark.parametrize("order", ["I;16", "I;16L", "I;16B"])
def test_16_bit_grey_of_both_byte_orders(order: str) -> None:
    data = DEEP.astype(">u2" if order == "I;16B" else "<u2").tobytes()
    image = Image.frombytes(order, (WIDTH, HEIGHT), data)
    assert differences(PICTURES["I;16"][2], iter([(order, image)])) == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_on_every_way(orientation: int, tmp_path: Path) -> None:
    exif, file = Image.Exif(), BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(file, "PNG", exif=exif)
    turned = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: RGB[::-1].transpose(1, 0, 2),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: RGB[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    assert differences(turned, file_ways(file.getvalue(), tmp_path / "image.png")) == []
    assert differences(turned, url_ways(file.getvalue())) == []


@pytest.mark.parametrize(
    "source", [Image.new("I", (2, 2)), Image.new("F", (2, 2)), np.zeros((2, 2), np.uint16), np.zeros((2, 2, 3), np.float32)]
)
def test_levels_without_a_known_white_are_refused_alike(source: Any) -> None:
    with pytest.raises(ImageError, match=r"0\.\.255|255\)"):
        read_image(source)
