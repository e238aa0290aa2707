"""NV12 becomes the right colours, DLPack shares memory, and what does not fit is refused with its numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgeprune.errors import ImageError
from edgeprune.runtime.media.frames import NV12, dlpack_array, is_dlpack
from edgeprune.runtime.media.images import read_image

# The standards' own numbers: E'R = E'Y + a E'Cr and so on, brightness 219 steps above 16, colours 224 around 128.
STANDARD = {"bt601": (1.402, 0.344136286, 0.714136286, 1.772), "bt709": (1.5748, 0.187324273, 0.468124273, 1.8556)}


def exact(luma: np.ndarray, chroma: np.ndarray, matrix: str, full_range: bool) -> np.ndarray:
    """Return RGB as real numbers, [height, width, 3], by the standards' formulas, pixel by pixel."""
    red, green_blue, green_red, blue = STANDARD[matrix]
    near = chroma.repeat(2, axis=0).repeat(2, axis=1).astype(np.float64) - 128
    light = luma.astype(np.float64) if full_range else (luma.astype(np.float64) - 16) * 255 / 219
    cb, cr = np.moveaxis(near if full_range else near * 255 / 224, -1, 0)
    rgb = np.stack([light + red * cr, light - green_blue * cb - green_red * cr, light + blue * cb], axis=-1)
    return np.asarray(np.clip(rgb, 0, 255))


def planes(width: int, height: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    luma = draw.integers(0, 256, (height, width), dtype=np.uint8)
    return luma, draw.integers(0, 256, (height // 2, width // 2, 2), dtype=np.uint8)


def flat(luma: np.ndarray, chroma: np.ndarray, stride: int | None = None) -> np.ndarray:
    """Return the two planes as a driver lays them into memory, padding filled with noise."""
    rows = np.concatenate([luma, chroma.reshape(len(chroma), -1)])
    padding = np.random.default_rng(1).integers(0, 256, (len(rows), (stride or luma.shape[1]) - luma.shape[1]), dtype=np.uint8)
    return np.concatenate([rows, padding], axis=1).ravel()


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
def test_every_colour_is_the_nearest(matrix: str, full_range: bool) -> None:
    # Every pair of (Y, Cb) and of (Y, Cr), which red and blue depend on, and noise for green.
    steps = np.arange(256, dtype=np.uint8)
    chroma = np.zeros((256, 256, 2), np.uint8)
    chroma[..., 0], chroma[..., 1] = steps[:, None], steps[::-1, None]
    for luma, colours in [(np.tile(steps.repeat(2), (512, 1)), chroma), planes(512, 600)]:
        ours = NV12.from_planes(luma, colours, matrix=matrix, full_range=full_range).to_rgb()
        # On a tie either is right.
        assert np.abs(ours - exact(luma, colours, matrix, full_range)).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    ("light", "blue", "red", "full_range", "rgb"),
    [
        (16, 128, 128, False, (0, 0, 0)),
        (235, 128, 128, False, (255, 255, 255)),
        (81, 90, 240, False, (254, 0, 0)),  # the red bar of a test picture
        (145, 54, 34, False, (0, 255, 1)),
        (41, 240, 110, False, (0, 0, 255)),
        (0, 128, 128, True, (0, 0, 0)),
        (255, 128, 128, True, (255, 255, 255)),
        (76, 85, 255, True, (254, 0, 0)),
    ],
)
def test_colour_bars_by_hand(light: int, blue: int, red: int, full_range: bool, rgb: tuple[int, ...]) -> None:
    frame = NV12(bytes([light] * 4 + [blue, red]), 2, 2, full_range=full_range)
    assert (frame.to_rgb() == rgb).all()


def test_full_range_agrees_with_pillow() -> None:
    luma, chroma = planes(64, 48)
    wide = np.concatenate([luma[..., None], chroma.repeat(2, axis=0).repeat(2, axis=1)], axis=-1)
    pillow = np.asarray(Image.frombytes("YCbCr", (64, 48), wide.tobytes()).convert("RGB")).astype(int)
    ours = NV12.from_planes(luma, chroma, full_range=True).to_rgb()
    assert np.abs(ours - pillow).max() <= 1  # Pillow's tables cut off instead of rounding


@pytest.mark.parametrize("height", [2, 70, 72, 74, 150])
def test_any_number_of_rows(height: int) -> None:
    luma, chroma = planes(6, height)
    ours = NV12.from_planes(luma, chroma).to_rgb()
    assert np.abs(ours - exact(luma, chroma, "bt601", False)).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    "give",
    [
        lambda luma, chroma: NV12(flat(luma, chroma), 12, 8),
        lambda luma, chroma: NV12(flat(luma, chroma).tobytes(), 12, 8),
        lambda luma, chroma: NV12(memoryview(flat(luma, chroma, 16).tobytes()), 12, 8, stride=16),
        lambda luma, chroma: NV12(flat(luma, chroma, 16)[:-4], 12, 8, stride=16),  # the last padding left out
        lambda luma, chroma: NV12(np.append(flat(luma, chroma), np.zeros(99, np.uint8)), 12, 8),  # a buffer of whole pages
        lambda luma, chroma: NV12(flat(luma, chroma, 16).reshape(12, 16), 12, 8),
        lambda luma, chroma: NV12(flat(luma, chroma).reshape(12, 12), 12, 8, stride=12),
        lambda luma, chroma: NV12.from_planes(luma, chroma),
        lambda luma, chroma: NV12.from_planes(luma, chroma.reshape(4, 12)),
        lambda luma, chroma: NV12.from_planes(np.pad(luma, 3)[3:-3, 3:-3], np.pad(chroma.reshape(4, 12), 2)[2:-2, 2:-2]),
        lambda luma, chroma: NV12.from_planes(luma, chroma).copy(),
    ],
)
def test_every_way_to_give_a_frame_is_the_same(give: Callable[[np.ndarray, np.ndarray], NV12]) -> None:
    luma, chroma = planes(12, 8)
    frame = give(luma, chroma)
    assert (frame.width, frame.height) == (12, 8)
    np.testing.assert_array_equal(frame.luma, luma)
    np.testing.assert_array_equal(frame.chroma, chroma)
    np.testing.assert_array_equal(frame.to_rgb(), NV12.from_planes(luma, chroma).to_rgb())


def test_a_frame_is_a_view_of_its_buffer() -> None:
    buffer = flat(*planes(12, 8), stride=16)
    frame = NV12(buffer, 12, 8, stride=16)
    assert np.shares_memory(frame.luma, buffer)
    assert np.shares_memory(frame.chroma, buffer)
    assert not np.shares_memory(frame.copy().luma, buffer)
    assert np.shares_memory(NV12(buffer.reshape(12, 16), 12, 8).chroma, buffer)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NV12(bytes(12), 3, 4), "cannot be 3x4 pixels"),
        (lambda: NV12(bytes(12), 4, 3), "both sides are even"),
        (lambda: NV12(b"", 0, 0), "cannot be 0x0 pixels"),
        (lambda: NV12(bytes(460_799), 640, 480), "640x480 with 640 bytes a row needs 460800 bytes, not 460799"),
        (lambda: NV12(bytes(460_800), 640, 480, stride=768), "768 bytes a row needs 552832 bytes, not 460800"),
        (lambda: NV12(bytes(460_800), 640, 480, stride=320), "Rows of 640 pixels cannot be 320 bytes apart"),
        (lambda: NV12(bytes(460_800), 640, 480, matrix="bt2020"), "no colour matrix 'bt2020'"),
        (lambda: NV12(np.zeros((480, 640), np.uint8), 640, 480), r"is uint8 [720, 640 or more], not uint8 [480, 640]"),
        (lambda: NV12(np.zeros((720, 640), np.uint8), 640, 480, stride=768), "NV12.from_planes"),
        (lambda: NV12(np.zeros((720, 640)), 640, 480), "not float64 [720, 640]"),
        (lambda: NV12(np.zeros((480, 640, 3), np.uint8), 640, 480), "must be flat uint8, not uint8 [480, 640, 3]"),
        (lambda: NV12(np.zeros(921_600, np.uint8)[::2], 640, 480), "must be flat uint8"),
        (lambda: NV12("text", 2, 2), "NV12 data cannot be a str"),
        (lambda: NV12(None, 2, 2), "NV12 data cannot be a NoneType"),
        (
            lambda: NV12.from_planes(np.zeros((4, 6), np.uint8), np.zeros((2, 3), np.uint8)),
            "must be [2, 6] or [2, 3, 2], not [2, 3]",
        ),
        (lambda: NV12.from_planes(np.zeros((4, 6)), np.zeros((2, 6))), "must be uint8, not float64 and float64"),
        (lambda: NV12.from_planes(np.zeros((4, 5), np.uint8), np.zeros((2, 5), np.uint8)), "cannot be 5x4 pixels"),
        (lambda: NV12.from_planes(np.zeros(24, np.uint8), np.zeros((2, 5), np.uint8)), "cannot be 0x0 pixels"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ImageError) as caught:
        make()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_a_camera_frame_takes_milliseconds() -> None:
    frame, times = NV12(flat(*planes(1280, 720)), 1280, 720), []
    for _ in range(9):
        began = time.thread_time()
        frame.to_rgb()
        times.append(1e3 * (time.thread_time() - began))
    assert min(times) < 40  # 5 ms where it was measured; this catches a slow path, not a slow machine


def test_nv12_is_an_image() -> None:
    frame = NV12(flat(*planes(12, 8)), 12, 8)
    image = read_image(frame)
    assert (image.mode, image.size) == ("RGB", (12, 8))
    np.testing.assert_array_equal(np.asarray(image), frame.to_rgb())


def test_a_frame_that_is_too_large_is_refused_before_it_is_converted() -> None:
    luma, chroma = np.broadcast_to(np.uint8(0), (10_000, 10_000)), np.broadcast_to(np.uint8(0), (5_000, 5_000, 2))
    with pytest.raises(ImageError, match="more than 50 megapixels"):
        read_image(NV12.from_planes(luma, chroma))


def test_a_tensor_is_read_without_a_copy() -> None:
    tensor = torch.arange(24, dtype=torch.uint8).reshape(2, 4, 3)
    assert all(map(is_dlpack, [tensor]))
    array = dlpack_array(tensor)
    tensor[0, 0, 0] = 77
    assert array[0, 0, 0] == 77
    np.testing.assert_array_equal(np.asarray(read_image(tensor)), array)


def test_a_tensor_of_any_strides() -> None:
    tensor = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)
    np.testing.assert_array_equal(np.asarray(read_image(tensor.permute(1, 2, 0))), tensor.numpy().transpose(1, 2, 0))


class Elsewhere:
    """An array that is not in the CPU's memory."""

    def __init__(self, device: int) -> None:
        self.device = device

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nobody may ask for it")

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0


@pytest.mark.parametrize(("device", "words"), [(2, "on CUDA"), (13, "on CUDA"), (8, "on Metal"), (99, "on device type 99")])
def test_an_array_elsewhere_is_refused_with_the_remedy(device: int, words: str) -> None:
    with pytest.raises(ImageError) as caught:
        read_image(Elsewhere(device))
    assert words in str(caught.value)
    assert "array.cpu()" in caught.value.hint


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.zeros(2, 4, 3), "must be uint8, not float32"),
        (lambda: torch.zeros(3, 8, 9, dtype=torch.uint8), "tensor.permute(1, 2, 0)"),
        (lambda: torch.zeros(1, 2, 4, 3, dtype=torch.uint8), "array[0]"),
        (lambda: torch.zeros(2, 4, 3, requires_grad=True), "Cannot read the given torch Tensor"),
        (lambda: torch.zeros(2, 4, 3, dtype=torch.bfloat16), "Cannot read the given torch Tensor"),
        (lambda: torch.zeros(2, 4, 3, dtype=torch.uint8, device="meta"), "torch Tensor"),
    ],
)
def test_a_tensor_that_is_no_picture_is_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ImageError) as caught:
        read_image(make())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 350
