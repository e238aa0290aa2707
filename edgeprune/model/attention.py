"""Attention over keys that lie in three places: text, the visual tokens of this step, and those of earlier steps.

The caches of visual tokens stand apart from the text's: a decode step then appends to the text alone and reads the visual part
where it is, and whoever holds it may pass a prefix of it. The order of keys does not matter to attention, only who may see whom.

Visual keys and values begin with a null row that no token sees, so that no product has an empty side when there is no image: ONNX
Runtime's matrix product with a folded transpose dies of a division by zero there (1.31.1, FusedMatMul with transBatchB).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgeprune.families.base import DecoderParts


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps: `key` and `value` of text [1, kv heads, length, head_dim], of visual tokens [1 + K, kv heads,
    head_dim].
    """

    key: torch.Tensor
    value: torch.Tensor
    visual_key: torch.Tensor
    visual_value: torch.Tensor


def caches_of(flat: Sequence[torch.Tensor]) -> list[LayerCache]:
    """Return the caches whose text and then visual tensors stand in a row, key and value of each layer."""
    half = len(flat) // 2
    text, visual = flat[:half], flat[half:]
    return [LayerCache(*text[i : i + 2], *visual[i : i + 2]) for i in range(0, half, 2)]


def flat_text(caches: Sequence[LayerCache]) -> tuple[torch.Tensor, ...]:
    """Return the text part of caches in a row."""
    return tuple(part for cache in caches for part in (cache.key, cache.value))


def flat_visual(caches: Sequence[LayerCache]) -> tuple[torch.Tensor, ...]:
    """Return the visual part of caches in a row."""
    return tuple(part for cache in caches for part in (cache.visual_key, cache.visual_value))


@dataclass(frozen=True)
class Tokens:
    """The tokens between two layers: prefix, visual and suffix in a row, S in all."""

    hidden: torch.Tensor  # [S, hidden]
    cos: torch.Tensor  # [S, head_dim]
    sin: torch.Tensor  # [S, head_dim]
    order: torch.Tensor  # [V] indices of the visual tokens in the image
    sizes: tuple[int, int, int]

    def keep(self, chosen: torch.Tensor) -> Tokens:
        """Return the tokens with only the chosen visual ones."""
        sizes = (self.sizes[0], chosen.shape[0], self.sizes[2])
        rows = [self._pick(rows, chosen) for rows in (self.hidden, self.cos, self.sin)]
        return Tokens(rows[0], rows[1], rows[2], self.order.index_select(0, chosen), sizes)

    def _pick(self, rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        before, visual, after = self.split(rows)
        return torch.cat([before, visual.index_select(0, chosen), after])

    def with_hidden(self, hidden: torch.Tensor) -> Tokens:
        """Return the same tokens in another state."""
        return Tokens(hidden, self.cos, self.sin, self.order, self.sizes)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the rows of prefix, visual tokens and suffix."""
        before, visual, after = torch.split(rows, list(self.sizes))
        return before, visual, after


@dataclass(frozen=True)
class Attended:
    """One layer's attention: `output` [S, hidden], `cache` with this step's text appended and this step's visual tokens alone.

    `scores` and `weights` [kv heads, group, S, keys] before and after mask and softmax; `parts`: how many of the keys are text,
    visual tokens of this step, and those of earlier steps, null rows included.
    """

    output: torch.Tensor
    cache: LayerCache
    scores: torch.Tensor
    weights: torch.Tensor
    parts: tuple[int, int, int]

    def last_row(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the attention of the last token [heads, keys] to each of the parts.

        It sees every key but the null rows, so it needs no mask: one extra row, whatever computes the main attention.
        """
        text, visual, past = torch.split(self.scores[:, :, -1].flatten(0, 1), list(self.parts), dim=1)
        sizes = [text.shape[1], visual.shape[1] - 1, past.shape[1] - 1]
        row = torch.softmax(torch.cat([text, visual[:, 1:], past[:, 1:]], dim=1), dim=-1)
        text, visual, past = torch.split(row, sizes, dim=1)
        return text, visual, past

    def last_rows(self, count: int) -> tuple[torch.Tensor, ...]:
        """Return the attention of the last tokens [heads, count, keys] to each of the parts."""
        parts = torch.split(self.weights[:, :, self.weights.shape[2] - count :].flatten(0, 1), list(self.parts), dim=2)
        return parts[0], parts[1][..., 1:], parts[2][..., 1:]

    def visual_columns(self) -> torch.Tensor:
        """Return every token's attention to this step's visual tokens [heads, S, V]."""
        return torch.split(self.weights, list(self.parts), dim=3)[1][..., 1:].flatten(0, 1)

    def past_columns(self) -> torch.Tensor:
        """Return every token's attention to the visual tokens of earlier steps [heads, S, K]."""
        return torch.split(self.weights, list(self.parts), dim=3)[2][..., 1:].flatten(0, 1)


def attend(attn: Any, shape: DecoderParts, hidden: torch.Tensor, tokens: Tokens, cache: LayerCache, mask: torch.Tensor) -> Attended:
    """Return the attention of `hidden` [S, hidden] over the cache and itself; `mask` [S, keys] as `causal_mask` returns it."""
    query, key = rotated(attn, shape, hidden, tokens)
    value = attn.v_proj(hidden).view(hidden.shape[0], shape.kv_heads, shape.head_dim)
    keys, visual_key = _append(cache.key, key, tokens)
    values, visual_value = _append(cache.value, value, tokens)
    # The query heads that share a KV head are folded into rows: no key is ever expanded.
    rows = query.flatten(1, 2)  # [kv heads, group * S, head_dim]
    scores = torch.cat(
        [rows @ keys[0].transpose(1, 2), rows @ visual_key.permute(1, 2, 0), rows @ cache.visual_key.permute(1, 2, 0)], dim=2
    ).view(*query.shape[:3], -1)
    weights = torch.softmax(scores + mask, dim=-1)
    parts = (keys.shape[2], visual_key.shape[0], cache.visual_key.shape[0])
    text, visual, past = torch.split(weights.flatten(1, 2), list(parts), dim=2)
    mixed = text @ values[0] + visual @ visual_value.transpose(0, 1) + past @ cache.visual_value.transpose(0, 1)
    output = attn.o_proj(mixed.view(query.shape).permute(2, 0, 1, 3).flatten(1))
    return Attended(output, LayerCache(keys, values, visual_key, visual_value), scores, weights, parts)


def rotated(attn: Any, shape: DecoderParts, hidden: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scaled queries [kv heads, group, S, head_dim] and keys [S, kv heads, head_dim], both at their positions."""
    length, group = hidden.shape[0], shape.heads // shape.kv_heads
    query = _rotate(attn.q_proj(hidden).view(length, shape.heads, shape.head_dim), tokens.cos, tokens.sin)
    key = _rotate(attn.k_proj(hidden).view(length, shape.kv_heads, shape.head_dim), tokens.cos, tokens.sin)
    return query.view(length, shape.kv_heads, group, shape.head_dim).permute(1, 2, 0, 3) * shape.head_dim**-0.5, key


def with_null(rows: torch.Tensor) -> torch.Tensor:
    """Return rows [K, ...] after a null row."""
    return torch.cat([rows.new_zeros(1, *rows.shape[1:]), rows])


def causal_mask(sizes: tuple[int, int, int], past_text: int, past_visual: int, device: torch.device) -> torch.Tensor:
    """Return 0 where a new token may look, -inf else [S, keys]; cached tokens are visible to all."""
    row = torch.arange(sum(sizes), device=device)
    before, visual, after = torch.split(row, list(sizes))
    # The place of each key among the new tokens, in the order of the parts. -1: it was there before. The null rows come too late.
    null = torch.full((1,), sum(sizes), device=device)
    past, seen = (torch.full((count,), -1, device=device) for count in (past_text, past_visual - 1))
    column = torch.cat([past, before, after, null, visual, null, seen])
    return torch.where(column[None] <= row[:, None], 0.0, float("-inf"))


def _append(past: torch.Tensor, rows: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    before, visual, after = tokens.split(rows)
    return torch.cat([past, before.transpose(0, 1)[None], after.transpose(0, 1)[None]], dim=2), with_null(visual)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    # Rotary embedding of [S, heads, head_dim], halves as pairs.
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
