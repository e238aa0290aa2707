"""The KV cache of a conversation: text that grows, and the visual tokens of each image, of which steps may read a prefix.

Visual keys and values lie token by token [1 + K, kv heads, head_dim], after a null row the highest-ranked first where a cache
cut ranked them. Keeping fewer is then a view of the same memory: nothing is copied, and the next question may have all of them
back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from edgeprune.bundle import DecoderShape

Arrays = tuple[np.ndarray, ...]  # key and value of layer 0, of layer 1, ...


@dataclass(frozen=True)
class KvCache:
    """`text` [1, kv heads, length, head_dim] each; `images`: for each image its arrays [1 + K, kv heads, head_dim], whole;
    `visual`: what steps read, the images one after the other.
    """

    text: Arrays
    images: tuple[Arrays, ...]
    visual: Arrays

    @classmethod
    def empty(cls, shape: DecoderShape) -> KvCache:
        """Return a cache that holds nothing."""
        text = np.zeros((1, shape.kv_heads, 0, shape.head_dim), shape.cache_type)
        null = np.zeros((1, shape.kv_heads, shape.head_dim), shape.cache_type)
        return cls((text,) * (2 * shape.layers), (), (null,) * (2 * shape.layers))

    def grown(self, text: Arrays, image: Arrays | None) -> KvCache:
        """Return the cache with other text and, after an image, its visual tokens. All images are whole again."""
        if image is None:
            return replace(self, text=text)
        images = (*self.images, image)
        return KvCache(text, images, _joined(images) if len(images) > 1 else image)

    def shortened(self, share: float, first_layer: int) -> KvCache:
        """Return the cache whose layers from `first_layer` on let steps read only that share of each image."""
        if not self.images:
            return self
        parts = tuple(
            tuple(rows if slot < 2 * first_layer else rows[: 1 + kept_of(len(rows) - 1, share)] for slot, rows in enumerate(image))
            for image in self.images
        )
        return replace(self, visual=_joined(parts) if len(parts) > 1 else parts[0])

    @property
    def bytes(self) -> int:
        """Memory of all keys and values, null rows left out."""
        return sum(rows.nbytes for rows in self.text) + sum(rows[1:].nbytes for image in self.images for rows in image)

    @property
    def visual_reads(self) -> int:
        """Visual tokens that a step reads, added up over the layers."""
        return sum(len(rows) - 1 for rows in self.visual[::2])


def kept_of(tokens: int, share: float) -> int:
    """Return how many of `tokens` a share keeps: rounded up, so that a share above zero never keeps nothing."""
    return math.ceil(tokens * share - 1e-6)


def _joined(images: tuple[Arrays, ...]) -> Arrays:
    # One null row is enough.
    first, *later = images
    return tuple(np.concatenate([head, *(rows[1:] for rows in tail)]) for head, *tail in zip(first, *later, strict=True))
