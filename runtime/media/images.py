"""Read an image from any source as upright RGB, or raise ImageError.

Pixels equal those of transformers. A path is read as image_utils.load_image reads it, and then as the Qwen2-VL processor does
(image_processing_backends.PilBackend.process_image, image_transforms.convert_to_rgb). A Pillow image or an array takes only the
second step. Therefore alpha is dropped from files, as in load_image, while images in memory are composited on white, as in the
processor. Departures: EXIF rotation is also applied to Pillow images, and only the formats below are opened (an EPS is a program,
an ICO may contain an image larger than its header states).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from edgeprune.errors import ImageError
from edgeprune.runtime.media.frames import NV12, DLPack, dlpack_array, is_dlpack

MAX_PIXELS = 50_000_000
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray | NV12 | DLPack


def read_image(source: ImageSource) -> Image.Image:
    """Return the image as upright RGB. Raises ImageError when it cannot be read or is not safe to read.

    Arrays are uint8 [height, width], or [height, width, channels] with 1, 3 or 4 channels. Arrays of other libraries (DLPack) must
    be in CPU memory. The result shares no memory with the source: Pillow stores four bytes per pixel, so pixels are copied once.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _decode(source, "the given Pillow image", from_file=False)
    if isinstance(source, (str, os.PathLike)):
        return _from_file(os.fsdecode(source))
    if isinstance(source, NV12):
        _check_size((source.width, source.height), "the NV12 frame")
        return Image.fromarray(source.to_rgb())
    if is_dlpack(source):
        return _from_array(dlpack_array(source))
    raise ImageError(f"Cannot read an image from {type(source).__name__}.", hint="Give a path, a Pillow image, an array or NV12.")


def _from_file(path: str) -> Image.Image:
    if not os.path.isfile(path):
        raise _no_file(path)
    with warnings.catch_warnings():
        # An ImageError reports the problem. Filter only Pillow's warnings, because filters apply to all threads.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        with _open(path) as image:
            return _decode(image, path, from_file=True)


def _no_file(path: str) -> ImageError:
    short = path if len(path) <= 200 else path[:200] + "..."
    if path.startswith(("http:/", "https:/", "data:")):
        address = re.sub(r"^(https?:)/(?!/)", r"\1//", short)  # pathlib makes one slash of two
        return ImageError(f"{address} is an address.", hint="Nothing is downloaded here: fetch it, then give the file.")
    if os.path.isdir(path):
        return ImageError(f"{short} is a folder.", hint="Give one image file.")
    if os.path.exists(path):
        return ImageError(f"{short} is not a regular file.", hint="Copy its data into a file and give that.")
    return ImageError(f"There is no image {short!r}.", hint="Check the path.")


def _open(path: str) -> Image.Image:
    try:
        return Image.open(path, formats=FORMATS)  # reads only the header
    except Image.DecompressionBombError as error:
        raise _too_large(path) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is not an image of a known format.", hint=f"Known are: {', '.join(FORMATS)}.") from error
    except PermissionError as error:
        raise ImageError(f"Not allowed to read {path}.", hint="Change its permissions.") from error
    except Exception as error:  # Pillow's decoders raise many types on damaged data
        raise _damaged(path, error) from error


def _decode(image: Image.Image, name: str, *, from_file: bool) -> Image.Image:
    _check_size(image.size, name)
    try:
        upright = ImageOps.exif_transpose(image)  # always a copy
        return _rgb(_on_white(_rgb(upright) if from_file else upright))
    except Exception as error:
        raise _damaged(name, error) from error


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    # A colour key (info["transparency"]) survives the conversion to RGB, unlike an alpha channel.
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA"))


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8:
        scale = "np.clip(255 * array, 0, 255)" if pixels.dtype.kind == "f" else "the array scaled to 0..255"
        raise ImageError(f"An image array must be uint8, not {pixels.dtype}.", hint=f"Give {scale} with .astype(np.uint8).")
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
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return ImageError(f"Cannot read {name}: {reason}.", hint="It is damaged or cut short; copy or save it again.")


def image_hash(frames: Sequence[Image.Image], *others: object) -> bytes:
    """Return a 16-byte hash of the frames' pixels and sizes and of `others`, which also determine the result."""
    digest = blake2b(repr((*(frame.size for frame in frames), *others)).encode(), digest_size=16)
    for frame in frames:
        digest.update(frame.tobytes())
    return digest.digest()
