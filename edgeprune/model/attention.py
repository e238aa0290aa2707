"""Attention over three groups of keys: cached text, the tokens of this step, and cached visual tokens.

Attention depends on the mask, not on the order of the keys, so the caches are read in place.

On CPUs attention runs in blocks of rows. The scores of a long prompt exceed the CPU's caches, and half of them are masked. The
scores of a block fit, and its products end at the last key that any of its rows attends to. The trace contains one node for this,
which `export/passes/attention.py` expands: a trace cannot follow both branches, and a step of few tokens reads the caches in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
_HALVES = (torch.float16, torch.bfloat16)
_ROWS = 1 << 20  # more than any step has
_NEVER = 1 << 50


@dataclass(frozen=True)
class BlockMask:
    """The mask of blocked attention. Keys: cached visual tokens and cached text, without null rows, then this step's tokens.

    `mask` [S, keys] is added to the scores. A token attends to no key of this step at or after `reach` [S].
    """

    mask: torch.Tensor
    reach: torch.Tensor

    @classmethod
    def of(cls, tokens: TokenRows, past: int, weights: Sequence[torch.Tensor] = ()) -> BlockMask:
        """Return the mask for tokens after `past` keys that are visible to all of them.

        `weights`: what is added to the scores of the keys, in parts in their order; nothing if empty.
        """
        places = tokens.places
        visible = places[None] <= tokens.reach[:, None]
        row = torch.arange(1, places.shape[0] + 1, device=places.device)
        added = torch.where(visible, 0.0, float("-inf"))
        mask = torch.cat([added.new_zeros(places.shape[0], past), added], dim=1)
        mask = mask + torch.cat(list(weights))[None] if weights else mask
        return cls(mask, torch.where(visible, row, torch.zeros_like(row)).amax(dim=1))


def blocked(*inputs: torch.Tensor) -> torch.Tensor:
    """Add the node of blocked attention to the trace and return its output [kv heads, group, S, head_dim].

    `inputs` are named by INPUTS: `query` [kv heads, group, S, head_dim]; keys and values [n, kv heads, head_dim] of cached text,
    of this step and of cached visual tokens, including null rows; `mask` [S, keys] over them in this order; BlockMask's fields.
    """
    query = inputs[0]
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{OPERATOR}", inputs, dtype=query.dtype, shape=query.shape, version=1)


@dataclass(frozen=True)
class TokenRows:
    """The S tokens between two layers: prefix, visual tokens, suffix."""

    hidden: torch.Tensor  # [S, hidden]
    cos: torch.Tensor  # [S, head_dim] or a first part of it, or [S, 2 * head_dim]: layers with a window have the second half
    sin: torch.Tensor  # as cos
    places: torch.Tensor  # [S] in the sequence
    reach: torch.Tensor  # [S]: a token attends to those whose place is not beyond
    planes: torch.Tensor | None  # [S, planes * hidden] added after the first layers, 0 for text
    order: torch.Tensor  # [V] indices of the visual tokens in the image
    sizes: tuple[int, int, int]
    query_scale: torch.Tensor | None = None  # [S, 1] of the queries, by position; None for 1
    weight: torch.Tensor | None = None  # [S] logarithms of how many tokens each stands for, 0 for text; None if no cut weighs

    def keep(self, chosen: torch.Tensor) -> TokenRows:
        """Return the tokens with only the visual tokens at the positions `chosen` [K]."""
        sizes = (self.sizes[0], chosen.shape[0], self.sizes[2])
        names = ("hidden", "cos", "sin", "places", "reach")
        rows = {name: self.pick(getattr(self, name), chosen) for name in names}
        planes = None if self.planes is None else self.pick(self.planes, chosen)
        scale = None if self.query_scale is None else self.pick(self.query_scale, chosen)
        order = self.order.index_select(0, chosen)
        weight = None if self.weight is None else self.pick(self.weight, chosen)
        return TokenRows(**rows, planes=planes, order=order, sizes=sizes, query_scale=scale, weight=weight)

    def pick(self, rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return the rows [S, ...] of the text and of the visual tokens at the positions `chosen` [K]."""
        before, visual, after = self.split(rows)
        return torch.cat([before, visual.index_select(0, chosen), after])

    def with_hidden(self, hidden: torch.Tensor) -> TokenRows:
        """Return the same tokens with new hidden states [S, hidden]."""
        return replace(self, hidden=hidden)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the rows of prefix, visual tokens and suffix."""
        before, visual, after = torch.split(rows, list(self.sizes))
        return before, visual, after


@dataclass(frozen=True)
class Mask:
    """The attention mask: `visible` as booleans, `added` to scores as 0 or -inf; `in_row` for blocked attention only.

    If the input cut weighs, the logarithms of how many tokens each visual token stands for are `added` too.

    Both are [S, keys], or [kv heads, 1, S, keys] where a window meets keys that each head chose. `whole`: the mask without the
    window, if there is one. `last` [keys]: what is added to scores of the last token, 0 or -inf; None where it attends to all keys
    except the null rows.
    """

    visible: torch.Tensor
    added: torch.Tensor
    in_row: BlockMask | None = None
    whole: Mask | None = None
    last: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        visible: torch.Tensor,
        in_row: BlockMask | None = None,
        whole: Mask | None = None,
        weights: torch.Tensor | float = 0.0,
    ) -> Mask:
        """Return the mask of the keys that are `visible`; `weights` [keys] are added to their scores."""
        return cls(visible, torch.where(visible, weights, float("-inf")), in_row, whole)

    def hide(self, added: torch.Tensor) -> Mask:
        """Return the mask with `added` [S, K] on top for the last K keys, which are cached visual tokens."""
        before = self.added.shape[-1] - added.shape[1]
        joined = torch.cat([self.added[..., :before], self.added[..., before:] + added], dim=-1)
        return Mask(self.visible, joined, whole=None if self.whole is None else self.whole.hide(added))

    def biased(self, bias: torch.Tensor, past_text: int) -> Mask:
        """Return the mask with `bias` [S, S] on top for this step's keys, which follow `past_text` cached ones."""
        after = self.added.shape[-1] - past_text - bias.shape[1]
        whole = None if self.whole is None else self.whole.biased(bias, past_text)
        return Mask(self.visible, self.added + torch.nn.functional.pad(bias, (past_text, after)), whole=whole)


class Scores:
    """Attention scores of scaled queries [kv heads, group, S, head_dim] over the parts of the keys.

    They are computed on demand: next to a fused node, a cut that ranks by the last token costs only one row.
    """

    def __init__(self, query: torch.Tensor, keys: Sequence[torch.Tensor], mask: Mask, softcap: float | None = None) -> None:
        self._query, self._keys, self._mask, self._softcap = query, keys, mask, softcap  # keys: [kv heads, n, head_dim]
        self.parts = [key.shape[1] for key in keys]

    @cached_property
    def raw(self) -> torch.Tensor:
        """The capped scores before mask and softmax [kv heads, group, S, keys]."""
        return self._of(self._query)

    @cached_property
    def weights(self) -> torch.Tensor:
        """The attention weights, after mask and softmax, in float32 [kv heads, group, S, keys]."""
        return torch.softmax(self.raw.float() + self._mask.added, dim=-1)

    def under(self, mask: Mask) -> Scores:
        """Return the same scores under another mask."""
        other = Scores(self._query, self._keys, mask, self._softcap)
        other.__dict__ |= {"raw": self.raw} if "raw" in self.__dict__ else {}
        return other

    def last(self) -> torch.Tensor:
        """Return the raw scores of the last token [kv heads, group, keys], -inf for rows of caches that are not real."""
        rows = self.raw if "raw" in self.__dict__ else self._of(self._query[:, :, -1:])
        last = rows[:, :, -1].float()
        return last if self._mask.last is None else last + self._mask.last

    def _of(self, query: torch.Tensor) -> torch.Tensor:
        # GQA: query heads that share a KV head are folded into rows, so no key is expanded.
        rows = query.flatten(1, 2)  # [kv heads, group * S, head_dim]
        scores = torch.cat([rows @ key.transpose(1, 2) for key in self._keys], dim=2).view(*query.shape[:3], -1)
        return softcapped(scores, self._softcap)


@dataclass(frozen=True)
class AttentionOutput:
    """One layer's attention: its `output` [S, hidden], this step's KV `rows` and the `sizes` of its three segments.

    The parts of `scores` are cached text, this step, and cached visual tokens, including the null rows of the caches. Cuts rank by
    scores without the window of a layer: what one layer cannot see is still seen by others.
    """

    output: torch.Tensor
    rows: NewKv
    scores: Scores
    sizes: tuple[int, int, int]

    def last_row(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the attention of the last token [heads, keys] to all text and to this step's visual tokens.

        The last token attends to every key except the null rows, so it needs no mask.
        """
        past_text, step, past = torch.split(self.scores.last().flatten(0, 1), self.scores.parts, dim=1)
        sizes = [past_text.shape[1] - 1, *self.sizes, past.shape[1] - 1]
        row = torch.softmax(torch.cat([past_text[:, 1:], step, past[:, 1:]], dim=1), dim=-1)
        past_text, before, visual, after, _ = torch.split(row, sizes, dim=1)
        return torch.cat([past_text, before, after], dim=1), visual

    def last_rows_of_text(self, count: int) -> torch.Tensor:
        """Return the attention of the last `count` tokens to all text [heads, count, keys]."""
        weights = self.scores.weights
        past_text, step, _ = torch.split(weights[:, :, weights.shape[2] - count :].flatten(0, 1), self.scores.parts, dim=2)
        before, _, after = torch.split(step, list(self.sizes), dim=2)
        return torch.cat([past_text[..., 1:], before, after], dim=2)

    def visual_columns(self) -> torch.Tensor:
        """Return the attention of every token to this step's visual tokens [heads, S, V]."""
        return torch.split(self._part(1), list(self.sizes), dim=2)[1]

    def past_columns(self) -> torch.Tensor:
        """Return the attention of every token to the cached visual tokens [heads, S, K]."""
        return self._part(2)[..., 1:]

    def _part(self, part: int) -> torch.Tensor:
        return torch.split(self.scores.weights, self.scores.parts, dim=3)[part].flatten(0, 1)


def attend(
    attn: Any, shape: DecoderParts, hidden: torch.Tensor, tokens: TokenRows, cache: LayerCache, mask: Mask, *, fused: bool = False
) -> AttentionOutput:
    """Return the attention of `hidden` [S, hidden] over the cache and itself.

    Products are computed in the type of the cache, the rest in that of `hidden`. `fused` uses one operator each for attention and
    rotation (Attention and RotaryEmbedding of opset 23), over joined keys. TensorRT has kernels for Attention in half precision
    with head_dim 16 or more; with a soft cap, or a mask for each head, attention stays decomposed. So it does in a graph with
    loops, where NVIDIA's builder fails on the operator (TensorRT-RTX 1.7.1), and where tokens have weights. It is blocked if the
    mask has `in_row`.
    """
    query, key, gate = rotated(attn, shape, hidden, tokens, fused=fused, apart=mask.in_row is not None)
    query, key = query.to(cache.key.dtype), key.to(cache.key.dtype)
    value = attn.v_proj(hidden).view(hidden.shape[0], shape.kv_heads, shape.head_dim).to(cache.value.dtype)
    keys, values = (cache.key, key, cache.visual_key), (cache.value, value, cache.visual_value)
    by_head = [rows.transpose(0, 1) for rows in keys]
    scores = Scores(query, by_head, mask, shape.softcap)
    fits = shape.head_dim >= _SMALLEST_HEAD and shape.softcap is None and mask.visible.ndim == 2 and not shape.loops
    use_fused = fused and query.dtype in _HALVES and fits and tokens.weight is None
    if mask.in_row is not None:
        mixed = blocked(query, *keys, *values, mask.added, mask.in_row.mask, mask.in_row.reach)
    else:
        values_by_head = [rows.transpose(0, 1) for rows in values]
        mixed = _fused(query, by_head, values_by_head, mask) if use_fused else _mixed(scores, query, values_by_head)
    output = mixed.permute(2, 0, 1, 3).flatten(1).to(hidden.dtype)
    output = attn.o_proj(output if gate is None else output * gate.sigmoid())
    ranked = scores if mask.whole is None else scores.under(mask.whole)
    place = None if cache.place is None else tokens.places[:, None]
    weight = None if tokens.weight is None else tokens.weight[:, None]
    return AttentionOutput(output, NewKv(key, value, place, weight), ranked, tokens.sizes)


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
    attn: Any, shape: DecoderParts, hidden: torch.Tensor, tokens: TokenRows, *, fused: bool = False, apart: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return scaled queries [kv heads, group, S, head_dim] and keys [S, kv heads, head_dim], both with rotary positions.

    The third result is the gate [S, heads * head_dim] of the output, None without one. `apart`: where `fused`, each token is a
    sequence of its own, as steps of several conversations are for their attention.
    """
    length, group, gate = hidden.shape[0], shape.heads // shape.kv_heads, None
    rotate = partial(_rotate_fused, axis=1 if apart else 0) if fused else _rotate
    query = attn.q_proj(hidden)
    if shape.gated:
        query, gate = query.view(length, shape.heads, 2 * shape.head_dim).chunk(2, dim=2)
        gate = gate.flatten(1)
    query = _normed(attn, "q_norm", query.reshape(length, shape.heads, shape.head_dim))
    key = _normed(attn, "k_norm", attn.k_proj(hidden).view(length, shape.kv_heads, shape.head_dim))
    angles = [_angles(attn, rows, shape.head_dim) for rows in (tokens.cos, tokens.sin)]
    query, key = (_in_part(rotate, states, *angles) for states in (query, key))
    query = query if tokens.query_scale is None else query * tokens.query_scale[:, None]
    return query.view(length, shape.kv_heads, group, shape.head_dim).permute(1, 2, 0, 3) * attn.scaling, key, gate


def softcapped(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return scores brought smoothly between -cap and cap, in float32, or as they are without a cap."""
    return scores if cap is None else torch.tanh(scores.float() / cap) * cap


def places_of(positions: torch.Tensor, *, bidirectional: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the place [S] in the sequence of the tokens at `positions` [axes, S], and the last place [S] that each attends to.

    Text between the tiles of an image is in the prefix, so rows are not in sequence order. The first axis of the positions is.
    With mRoPE the tokens of one image share their time and keep the order of their rows. Bidirectional tokens attend to all.
    """
    places = positions[0]
    if bidirectional:
        return places, torch.full_like(places, _NEVER - 1)
    if positions.shape[0] == 3:
        places = places * _ROWS + torch.arange(positions.shape[1], device=positions.device)
    return places, positions[1] if positions.shape[0] == 2 else places


def sequence_order(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows [S] in the order of the sequence and the rank [S] of each row in it, given different `places` [S]."""
    ranks = torch.where(places[None] < places[:, None], 1.0, 0.0).sum(dim=1).long()
    return torch.zeros_like(ranks).scatter(0, ranks, torch.arange(ranks.shape[0], device=ranks.device)), ranks


def causal_mask(tokens: TokenRows, cache: LayerCache, *, blocked: bool = False) -> Mask:
    """Return the mask of new tokens after a cache, whose real rows are visible to all except the null rows.

    `blocked` adds the mask of blocked attention.
    """
    past_text, past_visual = cache.key.shape[0], cache.visual_key.shape[0]
    # The place of each key, in the order of the parts: -1 for cached tokens, and beyond every token for the null rows.
    null = torch.full_like(tokens.places[-1:], _NEVER)
    text, visual = (
        torch.full((rows - 1,), -1, device=null.device)
        if real is None
        else torch.where(torch.arange(1, rows, device=null.device) < real, -1, _NEVER)
        for rows, real in ((past_text, cache.rows), (past_visual, cache.visual_rows))
    )
    column = torch.cat([null, text, tokens.places, null, visual])
    weights = _weights(tokens, cache)
    of_blocks = [weights[2][1:], weights[0][1:], weights[1]] if weights else []
    in_row = BlockMask.of(tokens, past_text + past_visual - 2, of_blocks) if blocked else None
    mask = Mask.of(column[None] <= tokens.reach[:, None], in_row, weights=torch.cat(weights) if weights else 0.0)
    return mask if cache.rows is None else replace(mask, last=torch.where(mask.visible[-1], 0.0, float("-inf")))


def _weights(tokens: TokenRows, cache: LayerCache) -> list[torch.Tensor]:
    # What is added to the scores of the keys, in the order of the parts; nothing if no cut weighs.
    if tokens.weight is None or cache.weight is None or cache.visual_weight is None:
        return []
    return [cache.weight[:, 0], tokens.weight, cache.visual_weight[:, 0]]


def windowed_mask(whole: Mask, tokens: TokenRows, cache: LayerCache, window: int, *, bidirectional: bool = False) -> Mask:
    """Return a mask without the keys that are `window` or more places before a token.

    Bidirectional tokens of one step attend to each other at any distance, as in transformers' masks of PaliGemma 2.
    """
    assert cache.place is not None and cache.visual_place is not None
    # [1 or kv heads, keys], in the order of the parts. Null rows are hidden by `whole`.
    step = torch.full_like(tokens.places, _NEVER) if bidirectional else tokens.places
    heads = cache.visual_place.shape[1]
    column = torch.cat([cache.place.expand(-1, heads), step[:, None].expand(-1, heads), cache.visual_place])
    near = column.transpose(0, 1)[:, None] > tokens.places[:, None] - window  # [1 or kv heads, S, keys]
    weights = _weights(tokens, cache)
    return Mask.of(
        whole.visible & (near[0] if heads == 1 else near[:, None]), whole=whole, weights=torch.cat(weights) if weights else 0.0
    )


def _angles(attn: Any, rows: torch.Tensor, width: int) -> torch.Tensor:
    # The cosines or sines [S, width] of a layer.
    return rows if rows.shape[1] <= width else rows[:, width:] if attn.local else rows[:, :width]


def _normed(attn: Any, name: str, states: torch.Tensor) -> torch.Tensor:
    # Some families normalize the queries and keys of each head.
    norm = getattr(attn, name, None)
    return states if norm is None else norm(states)


def _in_part(rotate: Any, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    # Some families rotate only the first part of each head.
    width = cos.shape[1]
    turned: torch.Tensor = rotate(states[..., :width], cos, sin) if width < states.shape[2] else rotate(states, cos, sin)
    return turned if width == states.shape[2] else torch.cat([turned, states[..., width:]], dim=2)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    # Rotary embedding of [S, heads, head_dim], which pairs the two halves of a head.
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def _rotate_fused(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, axis: int) -> torch.Tensor:
    # The operator takes the angles of one half; the other half has the same. `axis`: that of the sequences among [sequences, S].
    half = cos.shape[1] // 2
    angles = (table.unsqueeze(axis)[..., :half] for table in (cos, sin))
    rows = states.flatten(1).unsqueeze(axis)  # [1, S, heads * head_dim] or [S, 1, ...]: this layout needs no transposition
    return torch.onnx.ops.rotary_embedding(rows, *angles, num_heads=states.shape[1]).view(states.shape)
