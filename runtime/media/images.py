"""Read an image from any source as upright RGB, or raise ImageError.

One picture has the same pixels whichever way it comes:

- EXIF orientation is applied.
- Alpha, a transparent colour and a palette's transparency are laid on white, as transformers' processors do
  (image_transforms.convert_to_rgb). transformers' image_utils.load_image drops the alpha of a file before the processor sees it.
- 16-bit grey is scaled to 8 bits by 1/257, as cv_bridge does. transformers clips it, so that all above 255 is white.
- 32-bit integers and floats are refused, because nothing says which value is white.
- Of an animation the first frame is read, or the one that a Pillow image stands at.

Only the formats below are opened: an EPS is a program, an ICO may contain an image larger than its header states.
"""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from io import BytesIO
from typing import IO, Any, TypeGuard

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from edgeprune.errors import ImageError
from edgeprune.runtime.media.frames import DLPack, RawFrame, YCbCr, dlpack_array, is_dlpack, scale_to_8_bits

MAX_PIXELS = 50_000_000
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_BRANDS = {"AVIF": {b"avif", b"avis"}, "HEIF": {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}}
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF 6.0, section 8
_ADDRESS = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+:/|data:", re.IGNORECASE)

ImageSource = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray | YCbCr | RawFrame | DLPack
)


def read_image(source: ImageSource) -> Image.Image:
    """Return the image as upright RGB. Raises ImageError when it cannot be read or is not safe to read.

    Bytes and binary file objects hold an image file, which is read from its beginning. Arrays are uint8 [height, width], or
    [height, width, channels] with 1, 3 or 4 channels. Arrays of other libraries (DLPack) must be in CPU memory. The result shares
    no memory with the source: Pillow stores four bytes per pixel, so pixels are copied once.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _decode(source, "the given Pillow image")
    if isinstance(source, (str, os.PathLike)):
        return _from_path(os.fsdecode(source))
    if isinstance(source, (YCbCr, RawFrame)):
        _check_size((source.width, source.height), f"the {type(source).__name__} frame")
        return _from_array(source.to_rgb() if isinstance(source, YCbCr) else source.to_array())
    if is_dlpack(source):
        return _from_array(dlpack_array(source))
    if is_file_content(source):
        return _from_file(BytesIO(file_content(source)), f"the given {type(source).__name__}")
    raise ImageError(
        f"Cannot read an image from {type(source).__name__}.",
        hint="Give a path, bytes, a binary file object, a Pillow image, an array or a camera frame.",
    )


def is_file_content(source: object) -> TypeGuard[bytes | bytearray | memoryview | IO[bytes]]:
    """Tell whether an object is bytes or a file object."""
    return isinstance(source, (bytes, bytearray, memoryview)) or callable(getattr(source, "read", None))


def file_content(source: Any) -> bytes:
    """Return the bytes of a bytes-like object, or of a binary file object from its beginning. Raises ImageError."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    name = f"the given {type(source).__name__}"
    try:
        if callable(getattr(source, "seekable", None)) and source.seekable():
            source.seek(0)
        data = source.read()
    except Exception as error:  # file objects of other libraries raise their own types
        raise ImageError(f"Cannot read {name}: {_reason(error)}.", hint="Give an open file, or its bytes.") from error
    if not isinstance(data, (bytes, bytearray, memoryview)):
        hint = 'Open the file in binary mode: open(path, "rb").'
        raise ImageError(f"Cannot read {name}: its read() returns {type(data).__name__}, not bytes.", hint=hint)
    return bytes(data)


def open_image(file: IO[bytes], name: str, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Return an image file as a Pillow image of which only the header was read.

    `name`: what messages call it. `formats`: Pillow's names of those allowed; AVIF and HEIF belong to FORMATS where they can be
    read. Raises ImageError for other formats, more than MAX_PIXELS, and damage.
    """
    try:
        kind = _iso_format(file.read(64)) if formats is FORMATS else ""
        file.seek(0)
        if kind:
            _require_reader(kind, name)
        with _without_warnings():
            image = Image.open(file, formats=(kind,) if kind else formats)
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except UnidentifiedImageError as error:
        known = f"Known are: {', '.join(formats)}{', AVIF, HEIF' if formats is FORMATS else ''}."
        raise ImageError(f"Cannot read {name}: it is not an image of a known format.", hint=known) from error
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged data
        raise _damaged(name, error) from error
    _check_size(image.size, name)
    return image


def _from_path(path: str) -> Image.Image:
    if not os.path.isfile(path):  # opening a pipe would wait for its writer
        raise _no_file(path)
    try:
        with open(path, "rb") as file:
            return _from_file(file, path)
    except FileNotFoundError as error:  # removed since
        raise _no_file(path) from error
    except PermissionError as error:
        raise ImageError(f"Not allowed to read {path}.", hint="Change its permissions.") from error
    except OSError as error:
        raise ImageError(f"Cannot read {path}: {_reason(error)}.", hint="Check the disk, or copy the file.") from error


def _from_file(file: IO[bytes], name: str) -> Image.Image:
    with open_image(file, name) as image:
        return _decode(image, name)


def _iso_format(head: bytes) -> str:
    # A file of ISO 14496-12 begins with a size, "ftyp", its brand, a version and the brands that it is compatible with.
    if head[4:8] != b"ftyp":
        return ""
    end = min(len(head), int.from_bytes(head[:4], "big"))
    brands = {head[8:12], *(head[start : start + 4] for start in range(16, end, 4))}
    return next((kind for kind, known in _BRANDS.items() if brands & known), "")


def _require_reader(kind: str, name: str) -> None:
    if kind == "AVIF":
        if "avif" in features.modules and features.check("avif"):
            return
        hint = 'Install it with: pip install "pillow>=11.3", or save the image as PNG.'
        raise ImageError(f"Cannot read {name}: it is an AVIF image, and the installed Pillow does not read AVIF.", hint=hint)
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError as error:
        hint = "Install it with: pip install pillow-heif, or save the image as JPEG."
        raise ImageError(f"Cannot read {name}: it is a HEIC image, and pillow-heif is not installed.", hint=hint) from error


def _no_file(path: str) -> ImageError:
    short = path if len(path) <= 200 else path[:200] + "..."
    if _ADDRESS.match(path):
        address = re.sub(r"^(\w+:)/(?!/)", r"\1//", short)  # pathlib makes one slash of two
        return ImageError(f"{address} is an address.", hint="Nothing is downloaded here: fetch it, then give the file.")
    if path.lower().startswith("file:"):
        return ImageError(f"There is no image {short!r}.", hint="Give the path without file://.")
    if os.path.isdir(path):
        return ImageError(f"{short} is a folder.", hint="Give one image file.")
    if os.path.exists(path):
        return ImageError(f"{short} is not a regular file.", hint="Copy its data into a file and give that.")
    return ImageError(f"There is no image {short!r}.", hint="Check the path.")


@contextmanager
def _without_warnings() -> Iterator[None]:
    # An ImageError reports the problem. Filter only Pillow's warnings, because filters apply to all threads.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _decode(image: Image.Image, name: str) -> Image.Image:
    _check_size(image.size, name)
    _check_mode(image, name)
    try:
        with _without_warnings():
            return _to_rgb(ImageOps.exif_transpose(image))  # always a copy
    except Exception as error:
        raise _damaged(name, error) from error


def _check_mode(image: Image.Image, name: str) -> None:
    problem = _unclear_levels(image)
    if problem:
        hint = 'Give a uint8 array of its pixels scaled to 0..255; of 16-bit grey, image.convert("I;16") will do.'
        raise ImageError(f"Cannot use {name}: {problem}.", hint=hint)


def _unclear_levels(image: Image.Image) -> str:
    # Why the image's black and white are not known; "" when they are.
    if image.mode == "F":
        return "its pixels are floats (mode F)"
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # as Pillow reads 16-bit PGM, and before 11.0 16-bit PNG
        return "its pixels are 32-bit integers (mode I)"
    if image.mode.startswith("I;16") and image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        if tags.get(_BITS_PER_SAMPLE) == (12,):
            return "its grey has 12 bits, which Pillow does not scale"
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            return "its 16-bit grey is inverted, which Pillow does not undo"
    return ""


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey_to_rgb(image)
    if image.mode in _WITH_ALPHA or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        coloured = image.convert("LA") if image.mode == "La" else image  # Pillow cannot convert La in one step
        return Image.alpha_composite(white, coloured.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    grey = scale_to_8_bits(values)
    if (key := image.info.get("transparency")) is not None:
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8:
        scale = "np.clip(255 * array, 0, 255)" if pixels.dtype.kind == "f" else "the array scaled to 0..255"
        grey = " Of 16-bit grey, Image.fromarray(array) will do." if pixels.dtype == np.uint16 and pixels.ndim == 2 else ""
        hint = f"Give {scale} with .astype(np.uint8).{grey}"
        raise ImageError(f"An image array must be uint8, not {pixels.dtype}.", hint=hint)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise ImageError(f"An image array cannot have shape {pixels.shape}.", hint=_shape_hint(pixels))
    _check_size((pixels.shape[1], pixels.shape[0]), f"the array of shape {pixels.shape}")
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return Image.fromarray(pixels.reshape(pixels.shape[:2])).convert("RGB")
    return Image.fromarray(_array_on_white(pixels) if pixels.shape[2] == 4 else np.ascontiguousarray(pixels))


def _shape_hint(pixels: np.ndarray) -> str:
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4):
        return "Channels come last: give array.transpose(1, 2, 0), or tensor.permute(1, 2, 0)."
    if pixels.ndim == 4:
        return "Give one image at a time: array[0]."
    return "Give [height, width], or [height, width, channels] with 1, 3 or 4 channels."


def _array_on_white(pixels: np.ndarray) -> np.ndarray:
    # Exact rounding of colour * alpha + white * (1 - alpha). Sums fit uint16 (at most 255 * 255 + 127). 255 is odd: no ties occur.
    colour, alpha = pixels[..., :3].astype(np.uint16), pixels[..., 3:].astype(np.uint16)
    return ((colour * alpha + (255 - alpha) * 255 + 127) // 255).astype(np.uint8)


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"Cannot use {name}: it is {width}x{height} pixels.", hint="Give an image with pixels in it.")
    if width * height > MAX_PIXELS:
        raise _too_large(f"{name} ({width}x{height})")


def _too_large(name: str) -> ImageError:
    return ImageError(f"Cannot use {name}: it has more than {MAX_PIXELS // 10**6} megapixels.", hint="Scale it down first.")


def _damaged(name: str, error: Exception) -> ImageError:
    return ImageError(f"Cannot read {name}: {_reason(error)}.", hint="It is damaged or cut short; copy or save it again.")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def image_hash(frames: Sequence[Image.Image], *others: object) -> bytes:
    """Return a 16-byte hash of the frames' pixels and sizes and of `others`, which also determine the result."""
    digest = blake2b(repr((*(frame.size for frame in frames), *others)).encode(), digest_size=16)
    for frame in frames:
        digest.update(frame.tobytes())
    return digest.digest()
