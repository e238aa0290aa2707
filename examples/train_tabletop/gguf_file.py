"""Read the tensors and the metadata of a GGUF file, as far as SmolLM2's Q4_1 file has them.

The layout is that of docs/gguf.md and ggml-common.h in ggml. Of the block formats Q4_1 and Q8_0 are read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_F32, _Q4_1, _Q8_0 = 0, 3, 8
_BLOCK = 32  # weights that share a scale


@dataclass(frozen=True)
class GgufFile:
    """Metadata by key, and float32 tensors by name, their shapes as torch has them: rows first."""

    metadata: dict[str, Any]
    tensors: dict[str, np.ndarray]


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.content, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.at += length
        return self.content[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            item, length = self.number("I"), self.number("Q")
            return [self.value(item) for _ in range(length)]
        return self.number(_NUMBERS[kind])


def read_gguf(content: bytes) -> GgufFile:
    """Return what a GGUF file of version 3 holds. Raises ValueError for another version or another block format."""
    reader = _Reader(content)
    reader.at = len(_MAGIC)
    if content[: len(_MAGIC)] != _MAGIC or (version := reader.number("I")) != 3:
        raise ValueError("This is no GGUF file of version 3." if content[:4] != _MAGIC else f"GGUF version {version} is not read.")
    count, entries = reader.number("Q"), reader.number("Q")
    metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(entries)}
    infos = []
    for _ in range(count):
        name, axes = reader.text(), reader.number("I")
        shape = tuple(reader.number("Q") for _ in range(axes))[::-1]
        infos.append((name, shape, reader.number("I"), reader.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-reader.at // alignment) * alignment
    return GgufFile(metadata, {name: _tensor(content, start + offset, shape, kind) for name, shape, kind, offset in infos})


def _tensor(content: bytes, offset: int, shape: tuple[int, ...], kind: int) -> np.ndarray:
    count = int(np.prod(shape))
    if kind == _F32:
        return np.frombuffer(content, "<f4", count, offset).reshape(shape)
    if kind == _Q4_1:
        # A block: scale and least value as float16, then 16 bytes; low halves are weights 0 to 15, high halves the rest.
        block = np.dtype([("scale", "<f2"), ("least", "<f2"), ("halves", "u1", _BLOCK // 2)])
        blocks = np.frombuffer(content, block, count // _BLOCK, offset)
        steps = np.concatenate([blocks["halves"] & 15, blocks["halves"] >> 4], axis=1)
        least = blocks["least"].astype(np.float32)[:, None]
        return (steps * blocks["scale"].astype(np.float32)[:, None] + least).reshape(shape)
    if kind == _Q8_0:
        block = np.dtype([("scale", "<f2"), ("steps", "i1", _BLOCK)])
        blocks = np.frombuffer(content, block, count // _BLOCK, offset)
        return (blocks["steps"] * blocks["scale"].astype(np.float32)[:, None]).reshape(shape)
    raise ValueError(f"Tensors of GGUF type {kind} are not read.")
