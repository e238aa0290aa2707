"""The inputs of a decoder forward pass: new tokens, and the KV cache of their conversation with the states of other layers.

The cache stores text, which grows, apart from the visual tokens of each image. Keys and values are stored token by token
[rows, kv heads, head_dim], after a null row. Text buffers are allocated for an entire answer, so a decode step copies only its own
rows. If a cache cut ranked the visual tokens, the highest-ranked come first: reading fewer is then a view of the same memory, and
the next request can read all of them again. Rows of bfloat16, which NumPy lacks, are held as their bits (uint16): nothing here
computes with them.

A layer without attention has states of fixed size instead. Every step returns new ones, so older caches stay valid; no token can be
taken out of a state again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from edgeprune.bundle import DecoderShape
from edgeprune.bundle.graph_io import GROUPS, PLACE, ROWS, TIER, WEIGHT, WEIGHTS, cache_slots, place_heads
from edgeprune.plan import KeepPlan, keep_count_up

T = TypeVar("T")
SYSTEM, INSTRUCTION, GENERATED = 0, 1, 2  # groups of text tokens
CAPACITY = 256  # capacities of caches that steps write in place are multiples of it, so that few sizes occur
# Key and value of each layer with attention, in order; places, for layers with a window; weights, if the input cut weighs.
KvArrays = tuple[np.ndarray, ...]


class KvBlock(tuple[np.ndarray, ...]):
    """Arrays of one shape that lie one behind the other: those of `block`, such as [arrays, rows, kv heads, head_dim].

    A row of all layers is then one copy instead of some sixty.
    """

    block: np.ndarray

    @classmethod
    def of(cls, block: np.ndarray) -> KvBlock:
        """Return the arrays of a block."""
        arrays = cls(block)
        arrays.block = block
        return arrays


@dataclass(frozen=True)
class TokenSegment:
    """Consecutive tokens: `embeds` [1, n, hidden] and `positions` [axes, n]. n may be 0."""

    embeds: np.ndarray
    positions: np.ndarray

    def concat(self, other: TokenSegment) -> TokenSegment:
        """Return these tokens followed by those of `other`."""
        return TokenSegment(
            np.concatenate([self.embeds, other.embeds], axis=1), np.concatenate([self.positions, other.positions], axis=1)
        )

    def first(self, count: int) -> TokenSegment:
        """Return the first tokens."""
        return TokenSegment(self.embeds[:, :count], self.positions[:, :count])

    def gather(self, indices: np.ndarray, embeds: np.ndarray) -> TokenSegment:
        """Return the tokens at `indices`, with new embeddings."""
        return TokenSegment(embeds, self.positions[:, indices])


@dataclass(frozen=True)
class DecoderInput:
    """The new tokens of one forward pass.

    `visual_indices` [V]: indices of the visual tokens in the image. `text_groups` [text, 3]: one-hot group (system, instruction,
    generated) of each text key, past and new. `tier`: index of the plan whose keep budgets apply. `weights` [V]: the logarithms of
    how many tokens each visual token stands for, if the plan weighs; None for one each.
    """

    prefix: TokenSegment
    visual: TokenSegment
    suffix: TokenSegment
    visual_indices: np.ndarray
    text_groups: np.ndarray
    tier: int = 0
    weights: np.ndarray | None = None

    @property
    def is_step(self) -> bool:
        """Whether this is a decode step: one token, and no image."""
        return self.suffix.embeds.shape[1] == 1 and not self.prefix.embeds.shape[1] and not self.visual.embeds.shape[1]


@dataclass(frozen=True)
class KvCache:
    """An immutable view of the keys and values of a conversation.

    `buffers`: text; the first `length` rows are valid. `images`: the complete arrays [1 + K, kv heads, head_dim] of each image.
    `visual`: the rows that decode steps read, image after image. `layers`: the layer of each array. `capacity`: minimum number of
    text rows of the next allocation. `states`: of the layers without attention, after all tokens of the cache.
    A cache and those derived from it share buffers: only the newest may grow.
    """

    buffers: KvArrays
    length: int
    images: tuple[KvArrays, ...]
    visual: KvArrays
    layers: tuple[int, ...]
    capacity: int = 0
    states: tuple[np.ndarray, ...] = ()

    @classmethod
    def empty(cls, shape: DecoderShape, plan: KeepPlan) -> KvCache:
        """Return an empty cache of a decoder under a plan."""
        null = np.zeros((1, shape.kv_heads, shape.head_dim), shape.row_type)
        slots = cache_slots(plan, shape.local_layers, shape.states)
        others = {WEIGHT: lambda layer: np.zeros((1, 1), np.float32)}
        others[PLACE] = lambda layer: np.zeros((1, place_heads(plan, layer, shape.kv_heads)), np.int64)
        nulls = tuple(others[part](layer) if part in others else null for layer, part in slots)
        states = tuple(np.zeros(state.shape, np.float32) for state in shape.states)
        return cls(nulls, 1, (), nulls, tuple(layer for layer, _ in slots), states=states)

    @property
    def text(self) -> KvArrays:
        """The valid text rows [1 + T, kv heads, head_dim], as views."""
        return tuple(rows[: self.length] for rows in self.buffers)

    def copy_prefix(self, length: int) -> KvCache:
        """Return a cache with a copy of the first `length` text rows and the same images; with states, of all text rows."""
        assert length == self.length or not self.states
        buffers = tuple(np.empty_like(rows, order="C", shape=(length, *rows.shape[1:])) for rows in self.buffers)
        for buffer, rows in zip(buffers, self.buffers, strict=True):
            buffer[:length] = rows[:length]
        return replace(self, buffers=buffers, length=length, capacity=0)

    def reserve(self, tokens: int) -> KvCache:
        """Return a cache that can append `tokens` text tokens with one allocation, whose memory stays untouched until use."""
        return replace(self, capacity=max(self.capacity, self.length + tokens))

    def append(self, rows: KvArrays, before: int, after: int, states: tuple[np.ndarray, ...] = ()) -> KvCache:
        """Return the cache with new rows appended: `before` prefix tokens, visual tokens of an image if any, `after` suffix tokens.

        No `rows`: a step has written its row behind the last of each buffer already. `states`: those after these tokens. A new
        image lifts the limit of `limit_visual` on all images.
        """
        length = self.length + before + after
        if not rows:
            return replace(self, length=length)
        buffers = self.buffers if len(self.buffers[0]) >= length else self._grow_buffers(rows, max(length, self.capacity))
        if isinstance(rows, KvBlock) and isinstance(buffers, KvBlock) and not before and rows.block.shape[1] == after:
            buffers.block[:, length - after : length] = rows.block
            return replace(self, buffers=buffers, length=length, states=states)
        for buffer, new in zip(buffers, rows, strict=True):
            if before:
                buffer[self.length : self.length + before] = new[:before]
            if after:
                buffer[length - after : length] = new[len(new) - after :]
        cache = replace(self, buffers=buffers, length=length, states=states)
        if all(len(new) == before + after for new in rows):
            return cache
        visual = tuple(new[before : len(new) - after] for new in rows)
        images = (*self.images, tuple(map(_with_null_row, visual)))
        return replace(cache, images=images, visual=_concat_images(images))

    def _grow_buffers(self, like: KvArrays, capacity: int) -> KvArrays:
        # Allocates where the new rows are, possibly in device memory. Powers of two, so that conversations can reuse each other's
        # blocks there, and no fewer than a step binds.
        capacity = max(1 << (capacity - 1).bit_length(), CAPACITY)
        buffers: KvArrays
        if all(type(new) is np.ndarray and (new.shape[1:], new.dtype) == (like[0].shape[1:], like[0].dtype) for new in like):
            buffers = KvBlock.of(np.empty((len(like), capacity, *like[0].shape[1:]), like[0].dtype))
        else:
            buffers = tuple(np.empty_like(new, order="C", shape=(capacity, *new.shape[1:])) for new in like)
        for buffer, old in zip(buffers, self.text, strict=True):
            buffer[: self.length] = old
        return buffers

    def limit_visual(self, share: float | Sequence[float], first_layer: int) -> KvCache:
        """Return a cache whose layers from `first_layer` on expose only a share of each image to decode steps.

        `share`: one for all layers, or the share of each layer.
        """
        if not self.images:
            return self
        shares = {layer: share if isinstance(share, (int, float)) else share[layer] for layer in set(self.layers)}
        parts = tuple(
            tuple(
                rows if layer < first_layer else rows[: 1 + keep_count_up(len(rows) - 1, shares[layer])]
                for layer, rows in zip(self.layers, image, strict=True)
            )
            for image in self.images
        )
        return replace(self, visual=_concat_images(parts))

    @property
    def bytes(self) -> int:
        """Bytes of all keys and values without null rows, and of the states."""
        text = (self.length - 1) * sum(map(_row_bytes, self.buffers))
        visual = sum(rows.nbytes - _row_bytes(rows) for image in self.images for rows in image)
        return text + visual + sum(state.nbytes for state in self.states)

    @property
    def visual_entries_read(self) -> int:
        """Visual tokens that a decode step reads, summed over the layers with attention."""
        keys = 2 * len(set(self.layers))
        return sum(len(rows) - 1 for rows in self.visual[:keys:2])


def can_step(plan: KeepPlan, tokens: DecoderInput, cache: KvCache) -> bool:
    """Return whether a pass is a decode step behind a prompt, of which nobody wants to know what the token attends to."""
    asked = plan.follows_attention and not tokens.text_groups[-1, GENERATED]
    return tokens.is_step and cache.length > 1 and not asked


def decoder_feeds(names: Sequence[str], tokens: DecoderInput, cache: KvCache, lengths: Sequence[int] = ()) -> dict[str, np.ndarray]:
    """Return the feeds of a forward pass for a decoder with these input names, in the order of `decoder_inputs`.

    `lengths`: what `length_slots` returns for it. All rows of the caches are real.
    """
    segments = (tokens.prefix, tokens.visual, tokens.suffix)
    values = [*(part.embeds for part in segments), *(part.positions for part in segments), tokens.visual_indices]
    if WEIGHTS in names:
        values.append(np.zeros(len(tokens.visual_indices), np.float32) if tokens.weights is None else tokens.weights)
    values += [np.zeros(1 + tokens.tier, np.int64)] if TIER in names else []
    values += [tokens.text_groups] if GROUPS in names else []
    values += [np.array([cache.length, *(len(cache.visual[slot]) for slot in lengths)])] if ROWS in names else []
    return dict(zip(names, (*values, *cache.text, *cache.visual, *cache.states), strict=True))


def split_outputs(outputs: Sequence[T], slots: int, states: int) -> tuple[tuple[T, ...], tuple[T, ...], tuple[T, ...]]:
    """Return the new rows of the caches, the states and the kept indices among a decoder's outputs after the logits."""
    return tuple(outputs[:slots]), tuple(outputs[slots : slots + states]), tuple(outputs[slots + states :])


def _row_bytes(rows: np.ndarray) -> int:
    return rows.nbytes // len(rows)


def bfloat16_as_float32(bits: np.ndarray) -> np.ndarray:
    """Return the float32 numbers of bfloat16's bits (uint16), which are the first half of theirs."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_as_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Return the bits (uint16) of float32 numbers that bfloat16 holds exactly."""
    return (np.ascontiguousarray(numbers).view(np.uint32) >> 16).astype(np.uint16)


def _with_null_row(rows: np.ndarray) -> np.ndarray:
    padded = np.empty_like(rows, order="C", shape=(1 + len(rows), *rows.shape[1:]))
    padded[:1] = np.zeros((1, *rows.shape[1:]), rows.dtype)
    padded[1:] = rows
    return padded


def _concat_images(images: tuple[KvArrays, ...]) -> KvArrays:
    # The result needs only one null row, that of the first image.
    first, *later = images
    if not later:
        return first
    return tuple(np.concatenate([head, *(rows[1:] for rows in tail)]) for head, *tail in zip(first, *later, strict=True))
