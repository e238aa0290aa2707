"""What the decoder's layers keep: text and visual tokens apart, row by row, and what one step adds to them.

A step returns its own rows alone, and whoever holds the caches writes them behind those that are there: nothing that grows is
copied. Caches of visual tokens stand apart from the text's, so that a prefix of them may be read.

Caches begin with a null row that no token sees, so that no product has an empty side when there is no image or no text yet: ONNX
Runtime's matrix product with a folded transpose dies of a division by zero there (1.31.1, FusedMatMul with transBatchB).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NewKv:
    """What a step adds to one layer: `key` and `value` [n, kv heads, head_dim] of its prefix, of the visual tokens that stay and of
    its suffix.
    """

    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps: `key` and `value` of text [1 + T, kv heads, head_dim], of visual tokens [1 + K, kv heads, head_dim]."""

    key: torch.Tensor
    value: torch.Tensor
    visual_key: torch.Tensor
    visual_value: torch.Tensor

    def append(self, rows: NewKv, before: int, after: int) -> LayerCache:
        """Return the cache with what a step adds whose prefix and suffix have `before` and `after` tokens."""
        end = rows.key.shape[0] - after
        texts = [torch.cat([old, new[:before], new[end:]]) for old, new in ((self.key, rows.key), (self.value, rows.value))]
        pairs = (self.visual_key, rows.key), (self.visual_value, rows.value)
        return LayerCache(*texts, *(torch.cat([old, new[before:end]]) for old, new in pairs))


def caches_of(flat: Sequence[torch.Tensor]) -> list[LayerCache]:
    """Return the caches whose text and then visual tensors stand in a row, key and value of each layer."""
    half = len(flat) // 2
    text, visual = flat[:half], flat[half:]
    return [LayerCache(*text[i : i + 2], *visual[i : i + 2]) for i in range(0, half, 2)]


def flat_rows(rows: Sequence[NewKv]) -> tuple[torch.Tensor, ...]:
    """Return the rows of every layer in a row, key and value of each."""
    return tuple(part for layer in rows for part in (layer.key, layer.value))
