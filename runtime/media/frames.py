"""Frames in the formats of cameras, and tensors of other libraries through DLPack.

NV12 is the format of most camera drivers and video decoders: a luma plane with one value per pixel, then a chroma plane with one
(Cb, Cr) pair per 2 x 2 pixels. A frame consists of views of the caller's buffer. Only its conversion and `copy` copy data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import numpy as np

from edgeprune.errors import ImageError

# Weights of red and blue in luma: ITU-R BT.601-7, section 2.5.1, and BT.709-6, section 3.2.
MATRICES = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
_BLOCK = 72  # rows converted at once, so that the working set fits the L2 cache
_CPU, _CUDA_HOST = 1, 3  # DLDeviceType of dlpack.h
_DEVICES = {2: "CUDA", 13: "CUDA", 8: "Metal", 10: "ROCm"}


class DLPack(Protocol):
    """An array of any library that supports DLPack."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the DLPack capsule."""
        ...

    def __dlpack_device__(self) -> tuple[Any, Any]:
        """Return the device type and the device index."""
        ...


class YCbCr:
    """Luma uint8 [height, width] and chroma uint8 [height / n, width / m, 2], views of the camera's memory.

    `matrix`: one of MATRICES. `full_range`: luma is 0..255 instead of 16..235. Both sides are multiples of the chroma's.
    """

    def __init__(self, luma: np.ndarray, chroma: np.ndarray, *, matrix: str = "bt601", full_range: bool = False) -> None:
        self.luma, self.chroma = luma, chroma
        self.matrix, self.full_range = _check_matrix(matrix), full_range

    @property
    def width(self) -> int:
        """The width in pixels."""
        return int(self.luma.shape[1])

    @property
    def height(self) -> int:
        """The height in pixels."""
        return int(self.luma.shape[0])

    def copy(self) -> YCbCr:
        """Return a copy with its own memory."""
        return YCbCr(self.luma.copy(), self.chroma.copy(), matrix=self.matrix, full_range=self.full_range)

    def to_rgb(self) -> np.ndarray:
        """Convert to uint8 RGB [height, width, 3]. Values are rounded to nearest; chroma is upsampled by repetition."""
        rgb = np.empty((self.height, self.width, 3), np.uint8)
        gain, black = (1.0, 0.0) if self.full_range else (255 / 219, 16.0)
        colours = _colour_weights(self.matrix, 1.0 if self.full_range else 255 / 224)
        rows, columns = self.height // self.chroma.shape[0], self.width // self.chroma.shape[1]  # pixels of one chroma pair
        for top in range(0, self.height, _BLOCK):
            block = rgb[top : top + _BLOCK]
            luma = self.luma[top : top + _BLOCK].astype(np.float32)
            luma *= np.float32(gain)
            luma += np.float32(0.5 - black * gain)  # 0.5, because the conversion to integers truncates
            groups = luma.reshape(len(luma) // rows, rows, self.width)
            chroma = self.chroma[top // rows : (top + _BLOCK) // rows].astype(np.float32) - np.float32(128)
            for channel, (blue, red) in enumerate(colours):
                shift = chroma[..., 0] * np.float32(blue) + chroma[..., 1] * np.float32(red)
                value = groups + shift.repeat(columns, axis=1)[:, None]
                np.clip(value, 0, 255, out=value)
                block[..., channel] = value.reshape(luma.shape)
        return rgb


class NV12(YCbCr):
    """An NV12 frame: `luma` uint8 [height, width] and `chroma` uint8 [height / 2, width / 2, 2], views of the given buffer.

    `data`: bytes-like or uint8, flat, or [3 / 2 height, stride] with the chroma rows last. `stride`: bytes per row of both planes,
    by default `width`. For separate planes use `NV12.from_planes`. `matrix`: one of MATRICES; most cameras use bt601 below 720
    lines and bt709 above. `full_range`: luma is 0..255 instead of 16..235. Raises ImageError when size and data do not match.
    """

    def __init__(
        self, data: Any, width: int, height: int, *, stride: int | None = None, matrix: str = "bt601", full_range: bool = False
    ) -> None:
        _check_sides(width, height)
        rows = _packed_rows(data, width, height, stride)
        chroma = rows[height:].reshape(height // 2, width // 2, 2)
        super().__init__(rows[:height], chroma, matrix=matrix, full_range=full_range)

    @classmethod
    def from_planes(cls, luma: np.ndarray, chroma: np.ndarray, *, matrix: str = "bt601", full_range: bool = False) -> NV12:
        """Return a frame of two uint8 planes: [height, width], and [height / 2, width] or [height / 2, width / 2, 2].

        Slice off row padding first: `plane[:height, :width]`. Raises ImageError when the planes do not match.
        """
        if luma.dtype != np.uint8 or chroma.dtype != np.uint8:
            raise ImageError(
                f"The planes of NV12 must be uint8, not {luma.dtype} and {chroma.dtype}.", hint="Give the camera's bytes."
            )
        height, width = luma.shape if luma.ndim == 2 else (0, 0)
        _check_sides(width, height)
        if chroma.shape not in ((height // 2, width), (height // 2, width // 2, 2)):
            expected = f"[{height // 2}, {width}] or [{height // 2}, {width // 2}, 2]"
            raise ImageError(
                f"Beside a luma plane [{height}, {width}] the chroma plane must be {expected}, not {list(chroma.shape)}.",
                hint="Cut off the padding of both: plane[:height, :width].",
            )
        frame = cls.__new__(cls)
        YCbCr.__init__(frame, luma, chroma.reshape(height // 2, width // 2, 2), matrix=matrix, full_range=full_range)
        return frame

    def copy(self) -> NV12:
        """Return a copy with its own memory."""
        return NV12.from_planes(self.luma.copy(), self.chroma.copy(), matrix=self.matrix, full_range=self.full_range)


@dataclass(frozen=True, eq=False)
class RawFrame:
    """Pixels that are converted when they are used. `pixels` [height, width, ...]: a view of the camera's memory.

    `convert` returns them as uint8: [height, width], or RGB or RGBA [height, width, channels].
    """

    pixels: np.ndarray
    convert: Callable[[np.ndarray], np.ndarray]

    @property
    def width(self) -> int:
        """The width in pixels."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """The height in pixels."""
        return int(self.pixels.shape[0])

    def copy(self) -> RawFrame:
        """Return a copy with its own memory."""
        return RawFrame(self.pixels.copy(), self.convert)

    def to_array(self) -> np.ndarray:
        """Return the converted pixels."""
        return self.convert(self.pixels)


def scale_to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale 0..65535 to uint8 by 1/257, rounded to nearest, so that white stays white."""
    # 65407 and all above become 255, and sums stay within uint16. 257 is odd: no ties occur.
    scaled: np.ndarray = ((np.minimum(values, 65407) + 128) // 257).astype(np.uint8)
    return scaled


def is_dlpack(source: object) -> TypeGuard[DLPack]:
    """Tell whether an object supports DLPack."""
    return hasattr(source, "__dlpack__") and hasattr(source, "__dlpack_device__")


def dlpack_array(source: DLPack) -> np.ndarray:
    """Return another library's array as a NumPy view. Raises ImageError when its memory is not on the CPU."""
    try:
        device = int(source.__dlpack_device__()[0])
        if device in (_CPU, _CUDA_HOST):
            array: np.ndarray = np.from_dlpack(source)
            return array
    except Exception as error:  # each library raises its own types
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
        raise ImageError(f"Cannot read the given {_name(source)}: {reason}.", hint="Give a plain uint8 array.") from error
    where = _DEVICES.get(device, f"device type {device}")
    raise ImageError(f"The given {_name(source)} is on {where}, not on the CPU.", hint="Give array.cpu(), or a numpy array.")


def _name(source: object) -> str:
    return f"{type(source).__module__.partition('.')[0]} {type(source).__name__}"


def _check_matrix(matrix: str) -> str:
    if matrix not in MATRICES:
        raise ImageError(f"There is no colour matrix {matrix!r}.", hint=f"Known are: {', '.join(MATRICES)}.")
    return matrix


def _check_sides(width: int, height: int) -> None:
    if width < 2 or height < 2 or width % 2 or height % 2:
        raise ImageError(
            f"NV12 cannot be {width}x{height} pixels.", hint="It has one colour for 2 x 2 pixels: both sides are even, and not 0."
        )


def _packed_rows(data: Any, width: int, height: int, stride: int | None) -> np.ndarray:
    # Both planes as a view uint8 [3 / 2 height, width].
    count = height * 3 // 2
    if isinstance(data, np.ndarray) and data.ndim == 2:
        if data.dtype != np.uint8 or data.shape[0] != count or data.shape[1] < width or stride not in (None, data.strides[0]):
            raise ImageError(
                f"An NV12 frame of {width}x{height} is uint8 [{count}, {width} or more], not {data.dtype} {list(data.shape)}.",
                hint="Give planes that lie apart to NV12.from_planes.",
            )
        return data[:, :width]
    flat, step = _flat_bytes(data), width if stride is None else stride
    if step < width:
        raise ImageError(
            f"Rows of {width} pixels cannot be {step} bytes apart.", hint="Give the stride in bytes, padding included."
        )
    needed = step * (count - 1) + width  # drivers may omit the padding of the last row
    if flat.size < needed:
        size = f"An NV12 frame of {width}x{height} with {step} bytes a row"
        raise ImageError(f"{size} needs {needed} bytes, not {flat.size}.", hint="Check width, height and stride.")
    rows: np.ndarray = np.ndarray((count, width), np.uint8, flat, strides=(step, 1))
    return rows


def _flat_bytes(data: Any) -> np.ndarray:
    if isinstance(data, np.ndarray) and (data.ndim != 1 or data.dtype != np.uint8 or not data.flags.c_contiguous):
        raise ImageError(f"NV12 data must be flat uint8, not {data.dtype} {list(data.shape)}.", hint="Give the camera's bytes.")
    try:
        return np.frombuffer(data, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise ImageError(f"NV12 data cannot be a {type(data).__name__}: {error}.", hint="Give bytes or a uint8 array.") from error


def _colour_weights(matrix: str, gain: float) -> tuple[tuple[float, float], ...]:
    # Weights of (Cb, Cr) in red, green and blue.
    red, blue = MATRICES[matrix]
    green = 1 - red - blue
    cb, cr = 2 * (1 - blue) * gain, 2 * (1 - red) * gain
    return (0.0, cr), (-cb * blue / green, -cr * red / green), (cb, 0.0)
