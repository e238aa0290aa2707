"""Images, in every way in which one comes in: files, data URLs, arrays, NV12 frames, DLPack and ROS messages."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.errors import EdgePruneError, ImageError
from edgeprune.runtime.media import images
from edgeprune.runtime.media.frames import MATRICES, NV12
from edgeprune.runtime.media.images import read_image
from fuzz.files import in_file
from fuzz.mutations import bytes_variant, text_variant
from fuzz.target import Target, check_message, demand

MOST_PIXELS = 1 << 20  # the limit meanwhile: what is large is refused the same at any limit
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_OFTEN = ("u1",) * 20
_Decoder = tuple[Callable[[bytes], Any], Callable[[Any], Any]]  # of bytes to a message, and of a message to a picture
_SIZES = (0, 1, 2, 3, 4, 5, 8, 30, 64, 1023, 40_000, 2**31, -1, -2, 2**63)


def _settle(picture: Image.Image) -> bool:
    demand(picture.mode == "RGB" and min(picture.size) >= 1, "no RGB image")
    demand(picture.width * picture.height <= MOST_PIXELS, "an image over the limit")
    demand(np.asarray(picture).shape == (picture.height, picture.width, 3), "pixels that are not there")
    return True


def _small() -> None:
    images.MAX_PIXELS = MOST_PIXELS


def _read(data: bytes) -> bool:
    picture = read_image(in_file(data, "image.bin"))
    demand(read_image(data) == picture, "other pixels of bytes than of their file")
    return _settle(picture)


def image_files() -> Target:
    """Return the target of image files."""
    _small()
    return Target(_read, tuple(_written()), _image_variant)


def _written() -> Iterator[bytes]:
    pixels = np.arange(7 * 9 * 4, dtype=np.uint8).reshape(7, 9, 4)
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation
    for mode in ("RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "I;16"):
        for kind in _FORMATS:
            file = io.BytesIO()
            try:
                picture = Image.fromarray(pixels[..., :3]).convert(mode)
                picture.save(file, kind, **({"exif": turned} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
            except (OSError, ValueError):  # the format has no such pixels
                continue
            yield file.getvalue()
    several = [Image.fromarray(pixels[..., :3]), Image.fromarray(pixels[..., 1:])]
    for kind, more in (("GIF", {"transparency": 3}), ("WEBP", {}), ("PNG", {}), ("TIFF", {"compression": "tiff_lzw"})):
        file = io.BytesIO()
        several[0].save(file, kind, save_all=True, append_images=several[1:], **more)
        yield file.getvalue()


def _image_variant(data: bytes, random: Random) -> bytes:
    made = bytearray(bytes_variant(data, random))
    if len(made) > 30 and random.randrange(3) == 0:  # sizes stand near the beginning
        place = random.randrange(4, min(200, len(made) - 4))
        made[place : place + 4] = struct.pack(random.choice("<>") + "I", random.choice((0, 1, 1023, 65535, 2**31 - 1, 2**32 - 1)))
    return bytes(made)


def _fetch(data: bytes) -> bool:
    from edgeprune.runtime.server.request_mapping import EncodedImage

    encoded = EncodedImage.from_url(data.decode("utf-8", "replace"), MOST_PIXELS, "messages[0]")
    return _settle(encoded.decode(MOST_PIXELS))


def image_urls() -> Target:
    """Return the target of the server's data URLs."""
    from edgeprune.runtime.server.errors import ApiError

    _small()
    kinds = ("png", "jpeg", "webp", "gif")
    seeds = [f"data:image/{kind};base64,{base64.b64encode(data).decode()}" for kind in kinds for data in _of(kind.upper())]
    seeds += ["https://example.com/a.png", "file:///etc/passwd"]
    return Target(_fetch, tuple(seed.encode() for seed in seeds), _url_variant, (ApiError,))


def _of(kind: str) -> Iterator[bytes]:
    for mode in ("RGB", "L"):
        file = io.BytesIO()
        Image.new(mode, (9, 7), 77).save(file, kind)
        yield file.getvalue()


def _url_variant(data: bytes, random: Random) -> bytes:
    head, comma, body = data.partition(b",")
    way = random.randrange(5)
    if way == 0:
        return text_variant(head.decode("utf-8", "replace"), random).encode("utf-8", "replace") + comma + body
    if way == 1:
        return bytes_variant(data, random)
    try:
        return head + comma + base64.b64encode(_image_variant(base64.b64decode(body), random))
    except ValueError:
        return bytes_variant(data, random)


def _frame(data: bytes) -> bool:
    # The first bytes seed the choice of what is made of the others.
    choose, body = Random(data[:4]), data[4:]
    made: Any = _MAKERS[choose.randrange(len(_MAKERS))](body, choose)
    return _settle(read_image(made))


def _nv12(body: bytes, choose: Random) -> Any:
    sides = [choose.choice((2, 4, 6, choose.choice(_SIZES))) for _ in range(2)]
    options: dict[str, Any] = {"matrix": choose.choice((*MATRICES, "bt2020")), "full_range": bool(choose.randrange(2))}
    stride = choose.choice((None, None, sides[0], sides[0] + 3, choose.choice(_SIZES)))
    held: Any = choose.choice(
        (body, body, body, bytearray(body), np.frombuffer(body, np.uint8), _array(body, choose), None, "text", 3)
    )
    return NV12(held, *sides, stride=stride, **options)


def _planes(body: bytes, choose: Random) -> Any:
    return NV12.from_planes(_array(body, choose), _array(body[::-1], choose)).copy()


def _array(body: bytes, choose: Random) -> np.ndarray:
    kind = np.dtype(choose.choice((*_OFTEN, "i1", "u2", "f2", "f4", "f8", "c8", "?", "S3", "M8[s]", "O")))
    if kind.hasobject:
        return np.array([object()] * 4)
    flat = np.frombuffer(body[: len(body) // kind.itemsize * kind.itemsize], kind)
    shape = [choose.randrange(6) for _ in range(choose.randrange(5))]
    if choose.randrange(2):
        shape = [choose.choice((2, 3, 4)), choose.choice((2, 4)), *choose.choice(((), (3,), (4,), (1,)))]
    try:
        return np.resize(flat, shape)[choose.choice((slice(None), slice(None, None, -1), slice(None, None, 2)))]
    except (ValueError, IndexError):  # numpy's own refusals
        return flat


class _Tensor:
    # An array of another library, that may lie about where it is or have no data.
    def __init__(self, array: np.ndarray, choose: Random) -> None:
        self._array, self._device = array, choose.choice(((1, 0), (1, 0), (2, 0), (99, 0), ("x", 0), (), None, (3, 0)))
        self._fails = choose.randrange(4) == 0

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        if self._fails:
            raise RuntimeError("no\n\x1b data" * 400)
        return self._array.__dlpack__(*args, **kwargs)

    def __dlpack_device__(self) -> Any:
        return self._device


_MAKERS = (_array, _nv12, _planes, lambda body, choose: _Tensor(_array(body, choose), choose), lambda body, choose: body or None)


def frames() -> Target:
    """Return the target of what is in memory already: arrays of any type and shape, NV12 and DLPack."""
    _small()
    draw = np.random.default_rng(0)
    return Target(_frame, tuple(bytes([number, 0, 0, 0]) + draw.bytes(96) for number in range(40)), bytes_variant)


def _hear(data: bytes, decoders: tuple[_Decoder, ...], unreadable: type[Exception]) -> bool:
    taken = False
    for decode, reader in decoders:
        try:
            message = decode(data)
        except unreadable as error:  # as it says; the node passes over such a message
            check_message(str(error))
            continue
        try:
            taken = _settle(read_image(reader(message))) or taken
        except EdgePruneError as error:
            check_message(str(error))
            demand(isinstance(error, ImageError), "an error of another kind")
    return taken


def _image_messages(raw: Callable[..., Any], compressed: Callable[..., Any], array: Callable[[bytes], Any]) -> list[Any]:
    # `raw` and `compressed` make messages of the fields behind the header, `array` a sequence of bytes.
    steps = [("rgb8", 12), ("bgra8", 16), ("mono8", 4), ("mono16", 8), ("rgba16", 32), ("yuyv", 8), ("uyvy", 8)]
    messages = [raw(2, 4, name, 0, step, array(bytes(range(step * 2)))) for name, step in steps]
    messages += [raw(2, 4, name, 0, 4, array(bytes(range(12)))) for name in ("nv12", "nv21")]
    messages += [raw(4, 4, f"bayer_rggb{bits}", 1, bits // 2, array(bytes(range(2 * bits)))) for bits in (8, 16)]
    return messages + [compressed(kind.lower(), array(data)) for kind in ("PNG", "JPEG") for data in _of(kind)]


def ros_images() -> Target:
    """Return the target of messages with images, as they come over DDS."""
    from edgeprune.runtime.ros2.images import decode_compressed, decode_image
    from edgeprune.runtime.ros2.messages import CompressedImage, Header, Time
    from edgeprune.runtime.ros2.messages import Image as Message

    _small()
    head = Header(Time(1, 2), "camera")
    messages = _image_messages(partial(Message, head), partial(CompressedImage, head), bytes)
    kinds = ((Message.deserialize, decode_image), (CompressedImage.deserialize, decode_compressed))
    hear = partial(_hear, decoders=kinds, unreadable=ValueError)
    return Target(hear, tuple(message.serialize() for message in messages), bytes_variant)


def ros_zenoh() -> Target:
    """Return the target of messages with images, as they come over Zenoh."""
    from rosbags.serde import SerdeError

    from edgeprune.runtime.ros2.definitions import decode, encode, message
    from edgeprune.runtime.ros2.images import decode_compressed, decode_image

    _small()
    head = message("std_msgs/msg/Header", message("builtin_interfaces/msg/Time", 1, 2), "camera")
    raw, compressed = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
    messages = _image_messages(
        partial(message, raw, head), partial(message, compressed, head), partial(np.frombuffer, dtype=np.uint8)
    )
    kinds = ((partial(decode, raw), decode_image), (partial(decode, compressed), decode_compressed))
    hear = partial(_hear, decoders=kinds, unreadable=SerdeError)
    return Target(hear, tuple(encode(each) for each in messages), bytes_variant)
