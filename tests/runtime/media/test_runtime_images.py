"""Reading images: equal to transformers on what both read, one clear line on everything else."""

from __future__ import annotations

import io
import os
import struct
import sys
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, features
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from edgeprune.errors import ImageError
from edgeprune.runtime.media.images import FORMATS, MAX_PIXELS, read_image

MODES = ("1", "L", "LA", "P", "P key", "P alpha", "RGB", "RGB key", "RGBA", "L key", "CMYK")


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save_mode(mode: str, folder: Path) -> Path:
    """Save a noise image of a mode; "key" is a transparent colour, "alpha" one alpha value a palette entry."""
    base = Image.fromarray(noise(23, 31, 4), "RGBA")
    path = folder / ("image.tif" if mode == "CMYK" else "image.png")
    if mode == "P alpha":
        base.convert("RGB").convert("P").save(path, transparency=bytes(range(256)))
    elif mode.endswith("key"):
        image = base.convert("RGB").convert(mode.removesuffix(" key"))
        image.save(path, transparency=image.getpixel((3, 4)))
    else:
        base.convert("RGB" if mode == "P" else "RGBA").convert(mode).save(path)
    return path


def theirs(source: Path | Image.Image) -> np.ndarray:
    """The pixels transformers' processors take from a Pillow image, or from an upright opened file, before they resize."""
    if isinstance(source, Path):
        with Image.open(source) as opened:
            return theirs(ImageOps.exif_transpose(opened))
    return np.asarray(convert_to_rgb(source, return_numpy=True))


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A 1-bit PNG of that size whose pixel data is `data`."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def refusal(source: Any) -> str:
    """Return the message of the ImageError that reading the source raises."""
    with pytest.raises(ImageError) as caught:
        read_image(source)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.hint
    return message


# Before 5.23 transformers' conversion to RGB left the pixels under a transparent colour as they were.
like_transformers = pytest.mark.skipif(
    tuple(map(int, version("transformers").split(".")[:2])) < (5, 23), reason="this transformers treats transparency otherwise"
)


@like_transformers
@pytest.mark.parametrize("mode", MODES)
def test_file_equals_transformers(mode: str, tmp_path: Path) -> None:
    path = save_mode(mode, tmp_path)
    ours = read_image(path)
    assert ours.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(ours), theirs(path))


@like_transformers
@pytest.mark.parametrize("mode", MODES)
def test_pillow_image_equals_transformers(mode: str, tmp_path: Path) -> None:
    path = save_mode(mode, tmp_path)
    with Image.open(path) as ours, Image.open(path) as reference:
        np.testing.assert_array_equal(np.asarray(read_image(ours)), theirs(reference))


@like_transformers
@pytest.mark.parametrize("mode", MODES)
def test_only_alpha_differs_from_a_file_that_transformers_loads(mode: str, tmp_path: Path) -> None:
    path = save_mode(mode, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on the palette with alpha
        loaded = np.asarray(convert_to_rgb(load_image(str(path)), return_numpy=True))
    same = np.array_equal(np.asarray(read_image(path)), loaded)
    assert same is (mode not in ("LA", "P alpha", "RGBA"))  # load_image drops alpha before the processor sees it


@like_transformers
@pytest.mark.parametrize("extension", ["bmp", "gif", "jpg", "jp2", "ppm", "tif", "webp"])
def test_every_known_format_equals_transformers(extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{extension}"
    Image.fromarray(noise(23, 31)).save(path)
    np.testing.assert_array_equal(np.asarray(read_image(str(path))), theirs(path))


@like_transformers
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_equals_transformers(orientation: int, extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{extension}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise(23, 31)).save(path, exif=exif)
    ours = read_image(path)
    assert ours.size == ((31, 23) if orientation < 5 else (23, 31))
    np.testing.assert_array_equal(np.asarray(ours), theirs(path))
    with Image.open(path) as opened:
        assert read_image(opened) == ours


@like_transformers
@pytest.mark.parametrize("channels", [3, 4])
def test_array_equals_transformers(channels: int) -> None:
    pixels = noise(23, 31, channels)
    np.testing.assert_array_equal(np.asarray(read_image(pixels)), convert_to_rgb(pixels, return_numpy=True))


@like_transformers
def test_alpha_rounding_is_exact_everywhere() -> None:
    colour, alpha = np.mgrid[:256, :256].astype(np.uint8)
    pixels = np.stack([colour, colour, colour, alpha], axis=-1)
    np.testing.assert_array_equal(np.asarray(read_image(pixels)), convert_to_rgb(pixels, return_numpy=True))


def test_grey_arrays_fill_all_channels() -> None:
    pixels = noise(5, 7, 1)
    expected = np.repeat(pixels, 3, axis=-1)
    np.testing.assert_array_equal(np.asarray(read_image(pixels)), expected)
    np.testing.assert_array_equal(np.asarray(read_image(pixels[..., 0])), expected)


def test_array_of_any_strides() -> None:
    pixels = noise(9, 12)
    np.testing.assert_array_equal(np.asarray(read_image(pixels[::-1, ::2, ::-1])), pixels[::-1, ::2, ::-1])


def test_pixels_of_an_array_are_copied_once() -> None:
    # Pillow keeps four bytes of a pixel, out of sight of tracemalloc; on the way there nothing is copied.
    pixels = noise(720, 1280)
    tracemalloc.start()
    image = read_image(pixels)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_result_shares_nothing_with_the_source() -> None:
    source, pixels = Image.new("RGB", (4, 4), "red"), np.zeros((4, 4, 3), np.uint8)
    read_image(source).putpixel((0, 0), (0, 0, 255))
    from_pixels = read_image(pixels)
    pixels[:] = 255
    assert source.getpixel((0, 0)) == (255, 0, 0)
    assert from_pixels.getpixel((0, 0)) == (0, 0, 0)


def test_missing_file(tmp_path: Path) -> None:
    assert f"There is no image '{tmp_path / 'none.png'}'." in refusal(tmp_path / "none.png")
    assert "There is no image" in refusal("nul\0byte.png")
    assert "There is no image" in refusal("line\nbreak.png")
    assert "There is no image" in refusal("")
    assert len(refusal("A" * 100_000)) < 300


def test_folder_pipe_and_address(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refusal(tmp_path / "pipe")
    assert "fetch it" in refusal("https://example.com/a.png")
    assert "fetch it" in refusal("data:image/png;base64,AAAA")
    assert "fetch it" in refusal("rtsp://camera.local/stream")
    assert "without file://" in refusal("file:///tmp/a.png")


def test_a_file_that_is_removed_between_the_check_and_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "isfile", lambda path: True)
    assert "There is no image" in refusal(tmp_path / "gone.png")


def test_a_file_that_is_removed_after_it_was_opened(tmp_path: Path) -> None:
    path = save_mode("RGB", tmp_path)
    with Image.open(path) as image:
        path.unlink()
        assert read_image(image).size == (31, 23)


@pytest.mark.parametrize("data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", png(0, 9)])
def test_no_image(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(data)
    message = refusal(path)
    assert f"Cannot read {path}: it is not an image of a known format." in message
    assert all(name in message for name in FORMATS)


@pytest.mark.parametrize("part", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("extension", ["bmp", "gif", "jpg", "jp2", "png", "ppm", "tif", "webp"])
def test_truncated_file(extension: str, part: float, tmp_path: Path) -> None:
    path = tmp_path / f"image.{extension}"
    Image.fromarray(noise(40, 50)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    assert str(path) in refusal(path)


def test_garbled_pixels(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(png(64, 64, b"\x07" * 99))
    assert f"Cannot read {path}:" in refusal(path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_mode("RGB", tmp_path)

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", deny)  # root, as in a container, may read everything
    assert "Change its permissions" in refusal(path)


@pytest.mark.parametrize(
    ("width", "height"), [(10_000, 5_001), (10_000, 10_000), (12_000, 10_000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)]
)
def test_bomb_is_refused_from_its_header(width: int, height: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    row_bytes = 1 + (width + 7) // 8
    path.write_bytes(png(width, height, bytes(row_bytes * height) if width == 10_000 else b""))
    tracemalloc.start()
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and not even Pillow's warning is seen
        message = refusal(path)
    seconds, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "more than 50 megapixels" in message
    assert seconds < 0.5
    assert peak < 5_000_000


def test_largest_size_is_inclusive(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (10_000, MAX_PIXELS // 10_000)).save(path)
    assert read_image(path).size == (10_000, 5_000)


def test_large_pillow_image_and_array() -> None:
    assert "more than 50 megapixels" in refusal(Image.new("1", (10_000, 10_000)))
    assert "more than 50 megapixels" in refusal(np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (10_000, 10_000, 3)))


@pytest.mark.parametrize("make", [lambda: Image.new("RGB", (0, 5)), lambda: np.zeros((5, 0, 3), np.uint8)])
def test_nothing_in_it(make: Callable[[], Any]) -> None:
    assert "pixels in it" in refusal(make())


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((5, 6, 3), np.float32), "np.clip(255 * array, 0, 255) with .astype(np.uint8)"),
        (np.zeros((5, 6, 3), np.float64), "must be uint8, not float64"),
        (np.zeros((5, 6), bool), "not bool"),
        (np.zeros((5, 6, 3), np.int64), "not int64"),
        (np.zeros((5, 6), np.uint16), "scaled to 0..255"),
        (np.zeros((5, 6, 3), object), "not object"),
        (np.zeros((3, 5, 6), np.uint8), "array.transpose(1, 2, 0)"),
        (np.zeros((1, 5, 6, 3), np.uint8), "array[0]"),
        (np.zeros((5, 6, 2), np.uint8), "shape (5, 6, 2)"),
        (np.zeros((5, 6, 0), np.uint8), "shape (5, 6, 0)"),
        (np.zeros(5, np.uint8), "shape (5,)"),
        (np.array(5, np.uint8), "shape ()"),
    ],
)
def test_wrong_array(pixels: np.ndarray, words: str) -> None:
    assert words in refusal(pixels)


@pytest.mark.parametrize("source", [None, 5, b"image.png", bytearray(4), [[1, 2], [3, 4]]])
def test_wrong_type(source: Any) -> None:
    assert type(source).__name__ in refusal(source)


def test_closed_pillow_file(tmp_path: Path) -> None:
    with Image.open(save_mode("RGB", tmp_path)) as image:
        pass
    assert "Cannot read the given Pillow image" in refusal(image)


@pytest.mark.parametrize(("mode", "words"), [("F", "floats (mode F)"), ("I", "32-bit integers (mode I)")])
def test_pixels_without_a_known_white(mode: str, words: str, tmp_path: Path) -> None:
    image = Image.new(mode, (4, 3), 700)
    message = refusal(image)
    assert words in message and "scaled to 0..255" in message
    image.save(tmp_path / "image.tif")
    assert words in refusal(tmp_path / "image.tif")
    if mode == "I":  # the remedy works as typed
        assert read_image(image.convert("I;16")).getpixel((0, 0)) == (3, 3, 3)


@pytest.mark.parametrize(("tags", "words"), [({258: 12}, "12 bits"), ({258: 16, 262: 0}, "inverted")])
def test_16_bit_tiffs_that_pillow_reads_with_wrong_levels(tags: dict[int, int], words: str, tmp_path: Path) -> None:
    entries = {256: 2, 257: 1, 258: 16, 259: 1, 262: 1, 273: 200, 277: 1, 278: 1, 279: 4} | tags
    header = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    fields = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in sorted(entries.items()))
    (tmp_path / "image.tif").write_bytes((header + fields + bytes(4)).ljust(200, b"\0") + bytes([255, 15, 0, 255]))
    assert words in refusal(tmp_path / "image.tif")


def test_16_bit_grey_keeps_its_levels(tmp_path: Path) -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(levels / 257).astype(np.uint8)
    for name in ("image.png", "image.tif", "image.pgm"):
        Image.fromarray(levels).save(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / name))[..., 1], expected)
    image = Image.fromarray(levels)
    image.save(tmp_path / "key.png", transparency=300)
    expected.reshape(-1)[300] = 255
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "key.png"))[..., 2], expected)


@pytest.mark.parametrize("extension", ["gif", "png", "webp", "tif"])
def test_the_first_frame_of_an_animation_is_read(extension: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / f"image.{extension}", save_all=True, append_images=frames[1:])
    red, green, _ = (int(level) for level in np.asarray(read_image(tmp_path / f"image.{extension}"))[3, 4])
    assert red > 240 and green < 10


def test_exif_that_is_broken_or_large_does_not_hide_the_pixels(tmp_path: Path) -> None:
    image = Image.fromarray(noise(8, 9))
    for number, exif in enumerate((b"Exif\0\0no TIFF", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0" + bytes(65_000))):
        path = tmp_path / f"{number}.jpg"
        image.save(path, exif=exif)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_image(path).size == (9, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on opening
            opened = Image.open(path)
        with opened:
            assert read_image(opened).size == (9, 8)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (io.StringIO("text"), 'open(path, "rb")'),
        (io.BytesIO(b""), "not an image of a known format"),
        (memoryview(b"no image"), "the given memoryview"),
    ],
)
def test_what_holds_no_image_file(source: Any, words: str) -> None:
    assert words in refusal(source)


def test_a_file_object_that_is_closed(tmp_path: Path) -> None:
    with save_mode("RGB", tmp_path).open("rb") as file:
        pass
    assert "closed file" in refusal(file)


def test_a_file_object_is_read_from_its_beginning_each_time(tmp_path: Path) -> None:
    with save_mode("RGB", tmp_path).open("rb") as file:
        file.seek(50)
        assert read_image(file) == read_image(file)


def iso_file(*brands: bytes) -> bytes:
    """The beginning of a file of ISO 14496-12 with a major brand and others."""
    body = brands[0] + bytes(4) + b"".join(brands[1:])
    return struct.pack(">I", 8 + len(body)) + b"ftyp" + body + b"mdat" + bytes(40)


@pytest.mark.parametrize("brands", [(b"heic", b"mif1"), (b"mif1", b"heix"), (b"msf1", b"hevc")])
def test_heic_names_the_package_that_reads_it(brands: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "pip install pillow-heif" in refusal(iso_file(*brands))


def test_heic_is_read_where_pillow_heif_is(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    path = tmp_path / "image.heic"
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), "red")).save(path)
    assert read_image(path).size == (64, 48)


@pytest.mark.skipif("avif" not in features.modules or not features.check("avif"), reason="this Pillow does not read AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 6), (255, 0, 0, 0)).save(tmp_path / "image.avif")
    assert read_image(tmp_path / "image.avif").getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("brands", [(b"avif", b"mif1"), (b"mif1", b"avif")])
def test_avif_names_the_pillow_that_reads_it(brands: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(features.modules, "avif", raising=False)  # as before Pillow 11.3
    assert 'pip install "pillow>=11.3"' in refusal(iso_file(*brands))


def test_another_iso_file_is_no_image() -> None:
    assert "not an image of a known format" in refusal(iso_file(b"isom", b"mp41"))
