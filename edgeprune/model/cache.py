"""The KV cache of a layer, with separate tensors for text and visual tokens, and the rows that one step adds to it.

A layer without attention has states of fixed size in its place, which a step replaces.

A step returns only its new rows, and the owner of the caches appends them: no growing tensor is copied. Visual tokens have caches
of their own, so that a prefix of them can be read.

Every cache begins with a null row to which no token attends, so that no product has an empty operand when there is no image or no
text yet: ONNX Runtime 1.31.1 divides by zero there in a matrix product with a folded transpose (FusedMatMul with transBatchB).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NewKv:
    """The rows a step adds to one layer: `key` and `value` [n, kv heads, head_dim] of its prefix, kept visual tokens and suffix."""

    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class LayerCache:
    """One layer's KV cache: text [1 + T, kv heads, head_dim] and visual tokens [1 + K, kv heads, head_dim]."""

    key: torch.Tensor
    value: torch.Tensor
    visual_key: torch.Tensor
    visual_value: torch.Tensor

    def append(self, rows: NewKv, before: int, after: int) -> LayerCache:
        """Return the cache with the rows of a step appended; its prefix has `before` tokens and its suffix `after`."""
        end = rows.key.shape[0] - after
        texts = [torch.cat([old, new[:before], new[end:]]) for old, new in ((self.key, rows.key), (self.value, rows.value))]
        pairs = (self.visual_key, rows.key), (self.visual_value, rows.value)
        return LayerCache(*texts, *(torch.cat([old, new[before:end]]) for old, new in pairs))


@dataclass(frozen=True)
class LayerStates:
    """The states of one layer without attention, float32, in the order of its shapes in DecoderParts."""

    tensors: tuple[torch.Tensor, ...]


StateShapes = Mapping[int, tuple[tuple[int, ...], ...]]  # of the layers without attention


def caches_of(flat: Sequence[torch.Tensor], layers: int, states: StateShapes) -> list[LayerCache | LayerStates]:
    """Return each layer's cache, of a flat sequence of tensors.

    These are key and value of each layer with attention for text, then the same for visual tokens, then the states.
    """
    half = (len(flat) - sum(map(len, states.values()))) // 2
    text, visual, rest = iter(flat[:half]), iter(flat[half : 2 * half]), iter(flat[2 * half :])
    return [
        LayerStates(tuple(next(rest) for _ in states[layer]))
        if layer in states
        else LayerCache(next(text), next(text), next(visual), next(visual))
        for layer in range(layers)
    ]


def flat_rows(rows: Sequence[NewKv | LayerStates]) -> tuple[torch.Tensor, ...]:
    """Return the rows as a flat sequence: key and value of each layer with attention."""
    return tuple(part for layer in rows if isinstance(layer, NewKv) for part in (layer.key, layer.value))


def flat_states(rows: Sequence[NewKv | LayerStates]) -> tuple[torch.Tensor, ...]:
    """Return the states as a flat sequence, layer by layer."""
    return tuple(state for layer in rows if isinstance(layer, LayerStates) for state in layer.tensors)
