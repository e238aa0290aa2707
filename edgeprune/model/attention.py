"""Attention over keys that lie in three places: earlier text, this step's tokens, and the visual tokens of earlier steps.

The order of keys does not matter to attention, only who may see whom: the caches are read where they are.

For CPUs, attention runs in blocks of rows. The scores of a long prompt are larger than the CPU's caches, and half of them are
masked. Blocks keep them near, and the products of a block end with the last key that any of its rows sees. In the trace this is one
node, which `export/passes/attention.py` expands: no trace can follow both branches, and a step of few tokens reads the caches where
they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from edgeprune.families.base import DecoderParts
from edgeprune.model.cache import LayerCache, NewKv

DOMAIN, OPERATOR = "edgeprune", "BlockedAttention"
INPUTS = (
    *("query", "past_text_key", "key", "past_visual_key", "past_text_value", "value", "past_visual_value"),
    *("mask", "mask_in_row", "reach"),
)

_SMALLEST_HEAD = 16
_ROWS = 1 << 20  # more than any step has
_NEVER = 1 << 50


@dataclass(frozen=True)
class BlockMask:
    """Keys in one row: earlier visual tokens and earlier text, without their null rows, then this step's tokens in their order.

    `mask` [S, keys] is added to scores; the keys of this step that a token sees end before `reach` [S].
    """

    mask: torch.Tensor
    reach: torch.Tensor

    @classmethod
    def of(cls, places: torch.Tensor, past: int) -> BlockMask:
        """Return them for tokens at `places` [S] in the sequence, after `past` keys that all see."""
        visible = places[None] <= places[:, None]
        row = torch.arange(1, places.shape[0] + 1, device=places.device)
        added = torch.where(visible, 0.0, float("-inf"))
        mask = torch.cat([added.new_zeros(places.shape[0], past), added], dim=1)
        return cls(mask, torch.where(visible, row, torch.zeros_like(row)).amax(dim=1))


def blocked(*inputs: torch.Tensor) -> torch.Tensor:
    """Return, in a trace, the node of what is attended to, by INPUTS.

    `query` [kv heads, group, S, head_dim]; keys and values [n, kv heads, head_dim] of earlier text, of this step and of earlier
    visual tokens, null rows included; `mask` [S, keys] for these in this order; and what BlockMask says.
    """
    query = inputs[0]
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{OPERATOR}", inputs, dtype=query.dtype, shape=query.shape, version=1)


@dataclass(frozen=True)
class TokenRows:
    """The tokens between two layers: prefix, visual and suffix in a row, S in all."""

    hidden: torch.Tensor  # [S, hidden]
    cos: torch.Tensor  # [S, head_dim]
    sin: torch.Tensor  # [S, head_dim]
    places: torch.Tensor  # [S] in the sequence: a token sees those of lower or equal place
    planes: torch.Tensor | None  # [S, planes * hidden] what the first layers add, 0 for text
    order: torch.Tensor  # [V] indices of the visual tokens in the image
    sizes: tuple[int, int, int]

    def keep(self, chosen: torch.Tensor) -> TokenRows:
        """Return the tokens with only the chosen visual ones."""
        sizes = (self.sizes[0], chosen.shape[0], self.sizes[2])
        rows = [self._pick(rows, chosen) for rows in (self.hidden, self.cos, self.sin, self.places)]
        planes = None if self.planes is None else self._pick(self.planes, chosen)
        return TokenRows(rows[0], rows[1], rows[2], rows[3], planes, self.order.index_select(0, chosen), sizes)

    def _pick(self, rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        before, visual, after = self.split(rows)
        return torch.cat([before, visual.index_select(0, chosen), after])

    def with_hidden(self, hidden: torch.Tensor) -> TokenRows:
        """Return the same tokens in another state."""
        return replace(self, hidden=hidden)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the rows of prefix, visual tokens and suffix."""
        before, visual, after = torch.split(rows, list(self.sizes))
        return before, visual, after


@dataclass(frozen=True)
class Mask:
    """Who may see whom: `visible` [S, keys], and as what is added to scores, 0 or -inf; `in_row` for blocked attention alone."""

    visible: torch.Tensor
    added: torch.Tensor
    in_row: BlockMask | None = None


class Scores:
    """What attention is decided by: queries [kv heads, group, S, head_dim], scaled, and the keys of each part.

    Computed when asked for: where a fused node attends, a cut that ranks by the last token costs one row and no more.
    """

    def __init__(self, query: torch.Tensor, keys: Sequence[torch.Tensor], mask: Mask) -> None:
        self._query, self._keys, self._mask = query, keys, mask  # keys: [kv heads, n, head_dim]
        self.parts = [key.shape[1] for key in keys]

    @cached_property
    def raw(self) -> torch.Tensor:
        """Before mask and softmax [kv heads, group, S, keys]."""
        return self._of(self._query)

    @cached_property
    def weights(self) -> torch.Tensor:
        """After them, in float32."""
        return torch.softmax(self.raw.float() + self._mask.added, dim=-1)

    def last(self) -> torch.Tensor:
        """Return the raw scores of the last token [kv heads, group, keys]."""
        rows = self.raw if "raw" in self.__dict__ else self._of(self._query[:, :, -1:])
        return rows[:, :, -1].float()

    def _of(self, query: torch.Tensor) -> torch.Tensor:
        # The query heads that share a KV head are folded into rows: no key is ever expanded.
        rows = query.flatten(1, 2)  # [kv heads, group * S, head_dim]
        return torch.cat([rows @ key.transpose(1, 2) for key in self._keys], dim=2).view(*query.shape[:3], -1)


@dataclass(frozen=True)
class AttentionOutput:
    """One layer's attention: `output` [S, hidden] and the `rows` of this step's tokens, whose segments have `sizes`.

    The parts of its `scores` are earlier text, this step, and visual tokens of earlier steps, null rows of the caches included.
    """

    output: torch.Tensor
    rows: NewKv
    scores: Scores
    sizes: tuple[int, int, int]

    def last_row(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the attention of the last token [heads, keys] to all text and to this step's visual tokens.

        It sees every key but the null rows, so it needs no mask.
        """
        past_text, step, past = torch.split(self.scores.last().flatten(0, 1), self.scores.parts, dim=1)
        sizes = [past_text.shape[1] - 1, *self.sizes, past.shape[1] - 1]
        row = torch.softmax(torch.cat([past_text[:, 1:], step, past[:, 1:]], dim=1), dim=-1)
        past_text, before, visual, after, _ = torch.split(row, sizes, dim=1)
        return torch.cat([past_text, before, after], dim=1), visual

    def last_rows_of_text(self, count: int) -> torch.Tensor:
        """Return the attention of the last tokens to all text [heads, count, keys]."""
        weights = self.scores.weights
        past_text, step, _ = torch.split(weights[:, :, weights.shape[2] - count :].flatten(0, 1), self.scores.parts, dim=2)
        before, _, after = torch.split(step, list(self.sizes), dim=2)
        return torch.cat([past_text[..., 1:], before, after], dim=2)

    def visual_columns(self) -> torch.Tensor:
        """Return every token's attention to this step's visual tokens [heads, S, V]."""
        return torch.split(self._part(1), list(self.sizes), dim=2)[1]

    def past_columns(self) -> torch.Tensor:
        """Return every token's attention to the visual tokens of earlier steps [heads, S, K]."""
        return self._part(2)[..., 1:]

    def _part(self, part: int) -> torch.Tensor:
        return torch.split(self.scores.weights, self.scores.parts, dim=3)[part].flatten(0, 1)


def attend(
    attn: Any, shape: DecoderParts, hidden: torch.Tensor, tokens: TokenRows, cache: LayerCache, mask: Mask, *, fused: bool = False
) -> AttentionOutput:
    """Return the attention of `hidden` [S, hidden] over the cache and itself.

    `fused`: attend and rotate by one operator each (Attention and RotaryEmbedding of opset 23), for which the parts are joined.
    Products are computed in the type of the cache, the rest in that of `hidden`. TensorRT has kernels for Attention in half
    precision and heads of 16 or more; elsewhere it stays decomposed, or is blocked where the mask says how.
    """
    query, key = rotated(attn, shape, hidden, tokens, fused=fused)
    query, key = query.to(cache.key.dtype), key.to(cache.key.dtype)
    value = attn.v_proj(hidden).view(hidden.shape[0], shape.kv_heads, shape.head_dim).to(cache.value.dtype)
    keys, values = (cache.key, key, cache.visual_key), (cache.value, value, cache.visual_value)
    by_head = [rows.transpose(0, 1) for rows in keys]
    scores = Scores(query, by_head, mask)
    whole = fused and query.dtype is torch.float16 and shape.head_dim >= _SMALLEST_HEAD
    if mask.in_row is not None:
        mixed = blocked(query, *keys, *values, mask.added, mask.in_row.mask, mask.in_row.reach)
    else:
        values_by_head = [rows.transpose(0, 1) for rows in values]
        mixed = _fused(query, by_head, values_by_head, mask) if whole else _mixed(scores, query, values_by_head)
    output = attn.o_proj(mixed.permute(2, 0, 1, 3).flatten(1).to(hidden.dtype))
    return AttentionOutput(output, NewKv(key, value), scores, tokens.sizes)


def _mixed(scores: Scores, query: torch.Tensor, values: Sequence[torch.Tensor]) -> torch.Tensor:
    weights = scores.weights.to(query.dtype).flatten(1, 2)
    first, *others = (part @ value for part, value in zip(torch.split(weights, scores.parts, dim=2), values, strict=True))
    return sum(others, first).view(query.shape)


def _fused(query: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], mask: Mask) -> torch.Tensor:
    mixed = torch.nn.functional.scaled_dot_product_attention(
        query.flatten(0, 1)[None],
        torch.cat(list(keys), dim=1)[None],
        torch.cat(list(values), dim=1)[None],
        mask.visible[None, None],
        scale=1.0,
        enable_gqa=query.shape[1] > 1,
    )
    return mixed.view(query.shape)


def rotated(
    attn: Any, shape: DecoderParts, hidden: torch.Tensor, tokens: TokenRows, *, fused: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scaled queries [kv heads, group, S, head_dim] and keys [S, kv heads, head_dim], both at their positions."""
    length, group = hidden.shape[0], shape.heads // shape.kv_heads
    rotate = _rotate_fused if fused else _rotate
    query = _normed(attn, "q_norm", attn.q_proj(hidden).view(length, shape.heads, shape.head_dim))
    key = _normed(attn, "k_norm", attn.k_proj(hidden).view(length, shape.kv_heads, shape.head_dim))
    query, key = (rotate(states, tokens.cos, tokens.sin) for states in (query, key))
    return query.view(length, shape.kv_heads, group, shape.head_dim).permute(1, 2, 0, 3) * shape.head_dim**-0.5, key


def places_of(positions: torch.Tensor, *, bidirectional: bool = False) -> torch.Tensor:
    """Return the place [S] in the sequence of tokens at `positions` [axes, S], given in the order of their segments.

    Text between the tiles of an image stands in the prefix, so the order of the rows is not the order of the sequence; the first
    axis of the positions is, but for the tokens of one image with mRoPE, which share a time and keep their order. Tokens that all
    see each other have one place.
    """
    row = torch.arange(positions.shape[1], device=positions.device)
    return torch.zeros_like(row) if bidirectional else positions[0] * _ROWS + row


def causal_mask(tokens: TokenRows, past_text: int, past_visual: int, *, blocked: bool = False) -> Mask:
    """Return where new tokens may look, after caches of so many rows; what they hold is visible to all. `blocked`: attention is
    to be.
    """
    # In the order of the parts of the keys. -1: it was there before. The null rows come too late.
    null = torch.full_like(tokens.places[-1:], _NEVER)
    text, seen = (torch.full((rows - 1,), -1, device=null.device) for rows in (past_text, past_visual))
    column = torch.cat([null, text, tokens.places, null, seen])
    visible = column[None] <= tokens.places[:, None]
    in_row = BlockMask.of(tokens.places, past_text + past_visual - 2) if blocked else None
    return Mask(visible, torch.where(visible, 0.0, float("-inf")), in_row)


def _normed(attn: Any, name: str, states: torch.Tensor) -> torch.Tensor:
    # Some families norm the queries and keys of each head.
    norm = getattr(attn, name, None)
    return states if norm is None else norm(states)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    # Rotary embedding of [S, heads, head_dim], halves as pairs.
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def _rotate_fused(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    # The operator takes the angles of one half: those of the other are the same.
    half = cos.shape[1] // 2
    angles = cos[None, :, :half], sin[None, :, :half]
    rows = states.flatten(1)[None]  # [1, S, heads * head_dim]: heads side by side need no transposition
    return torch.onnx.ops.rotary_embedding(rows, *angles, num_heads=states.shape[1]).view(states.shape)
