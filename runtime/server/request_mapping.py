"""Convert a request to a runtime call: earlier turns, the question with its images, and sampling options.

Images must be data URLs. The server never downloads anything. What waits in the queue are images of the bundle's size: all sizes
are read from the files' headers first, and then one image after the other is decoded and fitted.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from edgeprune.errors import ImageError
from edgeprune.runtime import PreparedImage, Turn
from edgeprune.runtime.media.images import read_image
from edgeprune.runtime.server.errors import ApiError, ServerLimits, limit_exceeded
from edgeprune.runtime.server.schema import ChatRequest, ImagePart, Message, SchemaFormat

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_URL_SAFE = str.maketrans("-_", "+/")
_ANY_OBJECT = {"type": "object"}

Prepare = Callable[[Sequence[Image.Image]], PreparedImage]


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of an image file, its size (width, height) from its header, and its place in the request."""

    data: bytes
    size: tuple[int, int]
    param: str

    @classmethod
    def from_url(cls, url: str, max_pixels: int, param: str) -> EncodedImage:
        """Read the header of an image in a base64 data URL.

        The bytes decide on the format, because clients often name another one. Raises ApiError (400) for anything but a PNG, JPEG,
        WebP or GIF image of at most `max_pixels` pixels.
        """
        data = _decode_base64(url, param)
        with _opened(data, param, max_pixels) as image:
            return cls(data, image.size, param)

    def decode(self, max_pixels: int) -> Image.Image:
        """Return the upright RGB image, the first frame of an animation. Raises ApiError (400) unless it is complete."""
        with _opened(self.data, self.param, max_pixels) as image:
            return read_image(image)


@contextmanager
def _opened(data: bytes, param: str, max_pixels: int) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads only the header
                width, height = image.size
                if width * height > max_pixels:
                    message = f"The image is {width}x{height}, more than the {max_pixels} pixels allowed"
                    raise limit_exceeded("--max-pixels", 400, message, param=param)
                yield image
    except Image.DecompressionBombError as error:
        raise limit_exceeded(
            "--max-pixels", 400, f"The image has more than the {max_pixels} pixels allowed", param=param
        ) from error
    except ApiError:
        raise
    except ImageError as error:
        raise _invalid("The image cannot be used: it is damaged, cut short or too large.", param) from error
    except Exception as error:  # Pillow's decoders raise many types on damaged data
        raise _invalid("The image is not a readable PNG, JPEG, WebP or GIF file.", param) from error


def _decode_base64(url: str, param: str) -> bytes:
    # Also base64 with line breaks, in the alphabet for addresses, or without padding: clients send all of these.
    head, comma, body = url.partition(",")
    if not head.lower().startswith("data:") or not comma:
        raise _invalid("Nothing is downloaded here: give the image as a data URL (data:image/png;base64,...).", param)
    if head.lower().rpartition(";")[2].strip() != "base64":
        raise _invalid("A data URL must be in base64 (data:image/png;base64,...).", param)
    digits = "".join(body.split()).translate(_URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _invalid("The image's base64 is broken.", param) from error


def _invalid(message: str, param: str) -> ApiError:
    return ApiError(400, "invalid_image", message, param=param)


@dataclass(frozen=True)
class AnswerRequest:
    """The arguments of `Runtime.chat` and `Chat.ask`.

    `turn`: the question. `kept`: include the kept token indices in the response.
    """

    turn: Turn
    history: tuple[Turn, ...] = ()
    prune: bool = True
    tier: str | None = None
    deadline_ms: float | None = None
    kept: bool = False
    stream: bool = False
    include_usage: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)


def answer_request(
    request: ChatRequest,
    limits: ServerLimits,
    prepare: Prepare,
    *,
    video: bool = False,
    check: Callable[[], None] = lambda: None,
) -> AnswerRequest:
    """Convert a request, and decode and prepare its images.

    `prepare`: fits an image, or the frames of a video, to the bundle. `video`: the images of a message are the frames of one video.
    `check`: called before each image; it raises where nobody waits for the answer any more. Raises ApiError (400) for too many, too
    large or broken images, or no question, and the errors of `prepare`.
    """
    encoded = _encoded_images(request, limits)

    def frames(message: int) -> Iterator[Image.Image]:
        for image in encoded[message]:
            check()
            yield image.decode(limits.max_pixels)

    turns = [_turn(message, frames(number), prepare, video) for number, message in enumerate(request.messages)]
    if not (turns[-1].words.strip() or turns[-1].all_images):
        raise ApiError(400, "invalid_value", "The last message is empty: ask something.", param="messages")
    return AnswerRequest(
        turn=turns[-1],
        history=tuple(turns[:-1]),
        prune=request.prune,
        tier=request.tier,
        deadline_ms=request.deadline_ms,
        kept=request.kept,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        sampling=sampling_options(request),
    )


def _encoded_images(request: ChatRequest, limits: ServerLimits) -> list[list[EncodedImage]]:
    # Of each message. Nothing is decoded before all sizes are known to be within the limits.
    places = [
        [
            (part.image_url.url, f"messages[{number}].content[{at}].image_url.url")
            for at, part in enumerate(message.content)
            if isinstance(part, ImagePart)
        ]
        for number, message in enumerate(request.messages)
    ]
    count = sum(map(len, places))
    if count > limits.max_images:
        raise limit_exceeded(
            "--max-images", 400, f"The request has {count} images, more than the {limits.max_images} allowed", param="messages"
        )
    encoded = [[EncodedImage.from_url(url, limits.max_pixels, param) for url, param in message] for message in places]
    pixels = sum(image.size[0] * image.size[1] for message in encoded for image in message)
    if pixels > limits.max_request_pixels:
        message = f"The images of the request have {pixels} pixels, more than the {limits.max_request_pixels} allowed together"
        raise limit_exceeded("--max-request-pixels", 400, message, param="messages")
    return encoded


def _turn(message: Message, frames: Iterator[Image.Image], prepare: Prepare, video: bool) -> Turn:
    # The order of texts and images is the client's. The frames of a video stand where the first one does.
    parts, filmed = list[str | PreparedImage](), False
    for part in message.content:
        if not isinstance(part, ImagePart):
            parts.append(part.text)
        elif not filmed:
            parts.append(prepare(list(frames) if video else [next(frames)]))
            filmed = video
    role = "system" if message.role == "developer" else message.role
    if any(not isinstance(part, str) for part in parts):
        return Turn(role, [part for part in parts if part != ""])
    return Turn(role, "\n".join(part for part in parts if isinstance(part, str)))


def sampling_options(request: ChatRequest) -> dict[str, Any]:
    """Return the fields of Sampling that the request sets."""
    options = {
        "max_tokens": request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "top_k": None if request.top_k is None else max(0, request.top_k),
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "stop": request.stop,
        "choices": request.guided_choice,
        "json_schema": _schema(request),
        "skip_special_tokens": request.skip_special_tokens,
    }
    return {name: value for name, value in options.items() if value is not None}


def _schema(request: ChatRequest) -> Mapping[str, Any] | None:
    response_format = request.response_format
    if response_format is None or response_format.type == "text":
        return None
    return response_format.json_schema.schema_ if isinstance(response_format, SchemaFormat) else _ANY_OBJECT
