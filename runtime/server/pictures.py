"""Images of a request: data URLs only. Nothing is ever fetched."""

from __future__ import annotations

import base64
import binascii
import io
import warnings

from PIL import Image

from edgeprune.errors import ImageError
from edgeprune.runtime.media.images import read_image
from edgeprune.runtime.server.refusals import Refusal, too_much

_FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/jpg": "JPEG", "image/webp": "WEBP"}


def picture(url: str, max_pixels: int, param: str) -> Image.Image:
    """Return the upright RGB image in a data URL of base64.

    `param`: the URL's place in the request, for the message. Raises Refusal (400) for anything but a whole PNG, JPEG or WebP image
    of at most `max_pixels` pixels.
    """
    data, kind = _data(url, param)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with Image.open(io.BytesIO(data), formats=[kind]) as image:  # reads the header only
                _check_size(image, max_pixels, param)
                return read_image(image)
    except Image.DecompressionBombError as error:
        raise too_much("--max-pixels", 400, f"The image has more than the {max_pixels} pixels allowed", param=param) from error
    except Refusal:
        raise
    except ImageError as error:
        raise _invalid("The image cannot be used: it is damaged, cut short or too large.", param) from error
    except Exception as error:  # on damaged data, Pillow's decoders raise nearly anything
        raise _invalid(f"The image is not a readable {kind} file.", param) from error


def _data(url: str, param: str) -> tuple[bytes, str]:
    head, comma, body = url.partition(",")
    if not head.lower().startswith("data:") or not comma:
        raise _invalid("Nothing is downloaded here: give the image as a data URL (data:image/png;base64,...).", param)
    kind, *rest = head[5:].lower().split(";")
    if kind not in _FORMATS:
        raise _invalid(f"An image must be one of {', '.join(sorted({*_FORMATS} - {'image/jpg'}))}.", param)
    if rest != ["base64"]:
        raise _invalid("A data URL must be in base64 (data:image/png;base64,...).", param)
    try:
        return base64.b64decode(body, validate=True), _FORMATS[kind]
    except (binascii.Error, ValueError) as error:
        raise _invalid("The image's base64 is broken.", param) from error


def _check_size(image: Image.Image, max_pixels: int, param: str) -> None:
    width, height = image.size
    if width * height > max_pixels:
        message = f"The image is {width}x{height}, more than the {max_pixels} pixels allowed"
        raise too_much("--max-pixels", 400, message, param=param)


def _invalid(message: str, param: str) -> Refusal:
    return Refusal(400, "invalid_image", message, param=param)
