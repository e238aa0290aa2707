"""The KV cache of a layer, with separate tensors for text and visual tokens, and the rows that one step adds to it.

A step returns only its new rows, and the owner of the caches appends them: no growing tensor is copied. Visual tokens have caches
of their own, so that a prefix of them can be read.

Every cache begins with a null row to which no token attends, so that no product has an empty operand when there is no image or no
text yet: ONNX Runtime 1.31.1 divides by zero there in a matrix product with a folded transpose (FusedMatMul with transBatchB).
"""

from __future__ import annotations

from collections.abc import Sequence
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


def caches_of(flat: Sequence[torch.Tensor]) -> list[LayerCache]:
    """Return the caches of a flat sequence: key and value of each layer for text, then the same for visual tokens."""
    half = len(flat) // 2
    text, visual = flat[:half], flat[half:]
    return [LayerCache(*text[i : i + 2], *visual[i : i + 2]) for i in range(0, half, 2)]


def flat_rows(rows: Sequence[NewKv]) -> tuple[torch.Tensor, ...]:
    """Return the rows as a flat sequence: key and value of each layer."""
    return tuple(part for layer in rows for part in (layer.key, layer.value))
