"""Convert a request to a runtime call: earlier turns, the question with its images, and sampling options.

Images must be data URLs. The server never downloads anything.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from edgeprune.errors import ImageError
from edgeprune.runtime import Turn
from edgeprune.runtime.media.images import read_image
from edgeprune.runtime.server.errors import ApiError, ServerLimits, limit_exceeded
from edgeprune.runtime.server.schema import ChatRequest, ImagePart, Message, SchemaFormat, TextPart

_FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/jpg": "JPEG", "image/webp": "WEBP"}
_ANY_OBJECT = {"type": "object"}


def decode_image_url(url: str, max_pixels: int, param: str) -> Image.Image:
    """Return the upright RGB image of a base64 data URL.

    `param`: the URL's place in the request, for error messages. Raises ApiError (400) for anything but a complete PNG, JPEG or WebP
    image of at most `max_pixels` pixels.
    """
    data, kind = _decode_base64(url, param)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with Image.open(io.BytesIO(data), formats=[kind]) as image:  # reads only the header
                width, height = image.size
                if width * height > max_pixels:
                    message = f"The image is {width}x{height}, more than the {max_pixels} pixels allowed"
                    raise limit_exceeded("--max-pixels", 400, message, param=param)
                return read_image(image)
    except Image.DecompressionBombError as error:
        raise limit_exceeded(
            "--max-pixels", 400, f"The image has more than the {max_pixels} pixels allowed", param=param
        ) from error
    except ApiError:
        raise
    except ImageError as error:
        raise _invalid("The image cannot be used: it is damaged, cut short or too large.", param) from error
    except Exception as error:  # Pillow's decoders raise many types on damaged data
        raise _invalid(f"The image is not a readable {kind} file.", param) from error


def _decode_base64(url: str, param: str) -> tuple[bytes, str]:
    # The bytes of an image, and its Pillow format.
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


def _invalid(message: str, param: str) -> ApiError:
    return ApiError(400, "invalid_image", message, param=param)


@dataclass(frozen=True)
class AnswerRequest:
    """The arguments of `Runtime.chat` and `Chat.ask`. `kept`: include the kept token indices in the response."""

    prompt: str
    images: tuple[Image.Image, ...] = ()
    history: tuple[Turn, ...] = ()
    prune: bool = True
    tier: str | None = None
    deadline_ms: float | None = None
    kept: bool = False
    stream: bool = False
    include_usage: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)


def answer_request(request: ChatRequest, limits: ServerLimits) -> AnswerRequest:
    """Convert a request and decode its images. Raises ApiError (400) for too many, too large or broken images, or no question."""
    count = sum(isinstance(part, ImagePart) for message in request.messages for part in message.content)
    if count > limits.max_images:
        raise limit_exceeded(
            "--max-images", 400, f"The request has {count} images, more than the {limits.max_images} allowed", param="messages"
        )
    texts = [_text(message) for message in request.messages]
    images = [_images(message, f"messages[{number}]", limits) for number, message in enumerate(request.messages)]
    if not texts[-1].strip():
        raise ApiError(400, "invalid_value", "The last message has no text: ask something.", param="messages")
    roles = ["system" if message.role == "developer" else message.role for message in request.messages]
    *history, last = zip(roles, texts, images, strict=True)
    return AnswerRequest(
        prompt=last[1],
        images=last[2],
        history=tuple(Turn(*turn) for turn in history),
        prune=request.prune,
        tier=request.tier,
        deadline_ms=request.deadline_ms,
        kept=request.kept,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        sampling=_sampling(request),
    )


def _text(message: Message) -> str:
    return "\n".join(part.text for part in message.content if isinstance(part, TextPart))


def _images(message: Message, param: str, limits: ServerLimits) -> tuple[Image.Image, ...]:
    # In order. The runtime renders all images of a message before its text.
    places = [(f"{param}.content[{number}].image_url.url", part) for number, part in enumerate(message.content)]
    return tuple(
        decode_image_url(part.image_url.url, limits.max_pixels, place) for place, part in places if isinstance(part, ImagePart)
    )


def _sampling(request: ChatRequest) -> dict[str, Any]:
    # Missing options keep the runtime's defaults.
    options = {
        "max_tokens": request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "stop": [request.stop] if isinstance(request.stop, str) else request.stop,
        "choices": request.guided_choice,
        "json_schema": _schema(request),
    }
    return {name: value for name, value in options.items() if value is not None}


def _schema(request: ChatRequest) -> Mapping[str, Any] | None:
    response_format = request.response_format
    if response_format is None or response_format.type == "text":
        return None
    return response_format.json_schema.schema_ if isinstance(response_format, SchemaFormat) else _ANY_OBJECT
