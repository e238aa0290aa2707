"""What a forward of the decoder reads: new tokens, and the KV cache of their conversation.

The cache holds text that grows, and the visual tokens of each image, of which steps may read a prefix. Keys and values lie token
by token [rows, kv heads, head_dim], after a null row. New text is written behind the old, into room that was made for a whole
answer: a step copies its own rows and nothing else. Visual tokens lie the highest-ranked first where a cache cut ranked them:
keeping fewer is then a view of the same memory, and the next question may have all of them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgeprune.bundle import DecoderShape
from edgeprune.bundle.graph_io import GROUPS, TIER
from edgeprune.plan import keep_count_up

KvArrays = tuple[np.ndarray, ...]  # key and value of layer 0, of layer 1, ...


@dataclass(frozen=True)
class TokenSegment:
    """Consecutive tokens: `embeds` [1, n, hidden] and `positions` [axes, n]; n may be 0."""

    embeds: np.ndarray
    positions: np.ndarray

    def concat(self, other: TokenSegment) -> TokenSegment:
        """Return these tokens followed by others."""
        return TokenSegment(
            np.concatenate([self.embeds, other.embeds], axis=1), np.concatenate([self.positions, other.positions], axis=1)
        )

    def gather(self, indices: np.ndarray, embeds: np.ndarray) -> TokenSegment:
        """Return the tokens at some indices, with new embeddings."""
        return TokenSegment(embeds, self.positions[:, indices])


@dataclass(frozen=True)
class DecoderInput:
    """The new tokens of one forward. `visual_indices` [V]: indices of the visual tokens in the image; `text_groups` [text, 3]: for
    each text key, past and new, 1 in the column of its group (system, instruction, generated). `tier`: the number of the plan whose
    budgets count.
    """

    prefix: TokenSegment
    visual: TokenSegment
    suffix: TokenSegment
    visual_indices: np.ndarray
    text_groups: np.ndarray
    tier: int = 0


@dataclass(frozen=True)
class KvCache:
    """`buffers`: of which the first `length` rows are text. `images`: for each image its arrays [1 + K, kv heads, head_dim], whole;
    `visual`: what steps read, the images one after the other. `capacity`: rows of text for which there shall be buffers.

    Caches that grew from one another share their buffers: only the last one may grow.
    """

    buffers: KvArrays
    length: int
    images: tuple[KvArrays, ...]
    visual: KvArrays
    capacity: int = 0

    @classmethod
    def empty(cls, shape: DecoderShape) -> KvCache:
        """Return a cache that holds nothing."""
        nulls = (np.zeros((1, shape.kv_heads, shape.head_dim), shape.cache_type),) * (2 * shape.layers)
        return cls(nulls, 1, (), nulls)

    @property
    def text(self) -> KvArrays:
        """What steps read of text [1 + T, kv heads, head_dim]: views."""
        return tuple(rows[: self.length] for rows in self.buffers)

    def copy_prefix(self, length: int) -> KvCache:
        """Return a cache with the first `length` rows of text, in memory of its own, and the same images."""
        buffers = tuple(np.empty_like(rows, order="C", shape=(length, *rows.shape[1:])) for rows in self.buffers)
        for buffer, rows in zip(buffers, self.buffers, strict=True):
            buffer[:length] = rows[:length]
        return replace(self, buffers=buffers, length=length, capacity=0)

    def reserve(self, tokens: int) -> KvCache:
        """Return the cache that takes in so many more tokens of text with one allocation. Memory is not touched before its use."""
        return replace(self, capacity=max(self.capacity, self.length + tokens))

    def append(self, rows: KvArrays, before: int, after: int) -> KvCache:
        """Return the cache with the rows of a step whose prefix and suffix have `before` and `after` tokens; those between are of
        an image. After an image all images are whole again.
        """
        length = self.length + before + after
        buffers = self.buffers if len(self.buffers[0]) >= length else self._grow_buffers(rows, max(length, self.capacity))
        for buffer, new in zip(buffers, rows, strict=True):
            if before:
                buffer[self.length : self.length + before] = new[:before]
            if after:
                buffer[length - after : length] = new[len(new) - after :]
        cache = replace(self, buffers=buffers, length=length)
        visual = tuple(new[before : len(new) - after] for new in rows)
        return cache._with(tuple(map(_with_null_row, visual))) if any(map(len, visual)) else cache

    def _grow_buffers(self, like: KvArrays, capacity: int) -> KvArrays:
        # Where the rows of steps are: on a device, its memory. Few sizes, so that conversations find each other's blocks there.
        capacity = 1 << (capacity - 1).bit_length()
        buffers = tuple(np.empty_like(new, order="C", shape=(capacity, *new.shape[1:])) for new in like)
        for buffer, old in zip(buffers, self.text, strict=True):
            buffer[: self.length] = old
        return buffers

    def _with(self, image: KvArrays) -> KvCache:
        images = (*self.images, image)
        return replace(self, images=images, visual=_concat_images(images) if len(images) > 1 else image)

    def limit_visual(self, share: float, first_layer: int) -> KvCache:
        """Return the cache whose layers from `first_layer` on let steps read only that share of each image."""
        if not self.images:
            return self
        parts = tuple(
            tuple(
                rows if slot < 2 * first_layer else rows[: 1 + keep_count_up(len(rows) - 1, share)]
                for slot, rows in enumerate(image)
            )
            for image in self.images
        )
        return replace(self, visual=_concat_images(parts) if len(parts) > 1 else parts[0])

    @property
    def bytes(self) -> int:
        """Memory of all keys and values, null rows left out."""
        text = sum((self.length - 1) * (rows.nbytes // len(rows)) for rows in self.buffers)
        return text + sum(rows.nbytes - rows.nbytes // len(rows) for image in self.images for rows in image)

    @property
    def visual_entries_read(self) -> int:
        """Visual tokens that a step reads, added up over the layers."""
        return sum(len(rows) - 1 for rows in self.visual[::2])


def decoder_feeds(names: Sequence[str], tokens: DecoderInput, cache: KvCache) -> dict[str, np.ndarray]:
    """Return what a forward feeds to a decoder whose inputs have these names, as `decoder_inputs` puts them in order."""
    segments = (tokens.prefix, tokens.visual, tokens.suffix)
    values = [*(part.embeds for part in segments), *(part.positions for part in segments), tokens.visual_indices]
    values += [np.zeros(1 + tokens.tier, np.int64)] if TIER in names else []
    values += [tokens.text_groups] if GROUPS in names else []
    return dict(zip(names, (*values, *cache.text, *cache.visual), strict=True))


def _with_null_row(rows: np.ndarray) -> np.ndarray:
    found = np.empty_like(rows, order="C", shape=(1 + len(rows), *rows.shape[1:]))
    found[:1] = np.zeros((1, *rows.shape[1:]), rows.dtype)
    found[1:] = rows
    return found


def _concat_images(images: tuple[KvArrays, ...]) -> KvArrays:
    # One null row is enough.
    first, *later = images
    return tuple(np.concatenate([head, *(rows[1:] for rows in tail)]) for head, *tail in zip(first, *later, strict=True))
