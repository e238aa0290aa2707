"""The pruning-aware decoder: the family's own layers, our attention forward, the cuts of one plan.

The same module runs eagerly (verify, eval) and is traced (export), so there is no second implementation to keep equal. One
forward serves the image turn, text turns and every decode step: tokens enter as three segments, and a step without an image
simply has an empty visual one, in which case no cut removes anything. Visual embeddings passed in the prefix segment are
treated as text: that is how one graph also runs without pruning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeprune.families.base import DecoderParts
from edgeprune.methods.base import Method, View, keep_best
from edgeprune.plan import Cut, KeepPlan
from edgeprune.registry import method_class

Cache = tuple[torch.Tensor, torch.Tensor]  # keys and values, each [1, kv heads, length, head_dim]


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens: `embeds` [1, n, hidden] and integer `positions` [axes, n]; n may be 0."""

    embeds: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class StepOutput:
    """What one forward returns.

    `logits` [1, 1, vocabulary] of the last token; `caches` with the new tokens appended, one a layer; `kept` [K] for each cut:
    the indices, among the image's visual tokens, that passed it.
    """

    logits: torch.Tensor
    caches: tuple[Cache, ...]
    kept: tuple[torch.Tensor, ...]


class PrunedDecoder(nn.Module):
    """A decoder whose visual tokens thin out as a plan says."""

    def __init__(self, parts: DecoderParts, plan: KeepPlan) -> None:
        super().__init__()
        self.layers, self.norm, self.lm_head, self.rope = parts.layers, parts.norm, parts.lm_head, parts.rope
        self.heads, self.kv_heads, self.head_dim = parts.heads, parts.kv_heads, parts.head_dim
        self.plan = plan
        self.cuts: dict[int, tuple[Cut, Method]] = {
            cut.layer: (cut, method_class(cut.method)(cut, plan.geometry)) for cut in plan.cuts
        }

    def empty_caches(self) -> tuple[Cache, ...]:
        """Return caches of length 0, one a layer."""
        reference = next(self.parameters())
        empty = reference.new_zeros(1, self.kv_heads, 0, self.head_dim)
        return tuple((empty, empty) for _ in self.layers)

    def forward(self, prefix: Segment, visual: Segment, suffix: Segment, caches: Sequence[Cache]) -> StepOutput:
        """Run the tokens of three segments on top of the caches."""
        tokens = _Tokens.join(prefix, visual, suffix, self.rope)
        present: list[Cache] = []
        kept: list[torch.Tensor] = []
        row: torch.Tensor | None = None
        masks: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self._layers()):
            if index in self.cuts:
                tokens = self._cut(tokens, *self.cuts[index], row)
                kept.append(tokens.order)
            stage = self.plan.alive(index)
            if stage not in masks:
                masks[stage] = _causal_mask(tokens.hidden.shape[0], caches[index][0].shape[2])
            hidden = layer.input_layernorm(tokens.hidden)
            mixed, cache, row = self._attend(layer.self_attn, hidden, tokens, caches[index], masks[stage], index + 1)
            present.append(cache)
            hidden = tokens.hidden + mixed
            tokens = tokens.with_hidden(hidden + layer.mlp(layer.post_attention_layernorm(hidden)))
        logits = self.lm_head(self.norm(tokens.hidden[-1:]))
        return StepOutput(logits[None], tuple(present), tuple(kept))

    def _layers(self) -> list[Any]:
        return list(self.layers)

    def _cut(self, tokens: _Tokens, cut: Cut, method: Method, row: torch.Tensor | None) -> _Tokens:
        def attention() -> torch.Tensor:
            assert row is not None  # plans are checked: at the input, where no layer has run, no method asks for it
            return row

        return tokens.keep(keep_best(method.score(View(tokens.order, attention)), cut.keep))

    def _attend(
        self, attn: Any, hidden: torch.Tensor, tokens: _Tokens, cache: Cache, mask: torch.Tensor, next_layer: int
    ) -> tuple[torch.Tensor, Cache, torch.Tensor | None]:
        # The query heads that share a KV head are folded into rows: no key is ever expanded.
        length, group = hidden.shape[0], self.heads // self.kv_heads
        query = _rotate(attn.q_proj(hidden).view(length, self.heads, self.head_dim), tokens.cos, tokens.sin)
        key = _rotate(attn.k_proj(hidden).view(length, self.kv_heads, self.head_dim), tokens.cos, tokens.sin)
        value = attn.v_proj(hidden).view(length, self.kv_heads, self.head_dim)
        keys = torch.cat([cache[0], key.transpose(0, 1)[None]], dim=2)
        values = torch.cat([cache[1], value.transpose(0, 1)[None]], dim=2)
        query = query.view(length, self.kv_heads, group, self.head_dim).permute(1, 2, 0, 3) * self.head_dim**-0.5
        scores = query.flatten(1, 2) @ keys[0].transpose(1, 2)  # [kv heads, group * length, cached + length]
        scores = scores.view(self.kv_heads, group, length, -1)
        weights = torch.softmax(scores + mask, dim=-1)
        mixed = (weights.flatten(1, 2) @ values[0]).view(self.kv_heads, group, length, self.head_dim)
        output = attn.o_proj(mixed.permute(2, 0, 1, 3).flatten(1))
        row = self._visual_row(scores[:, :, -1:], tokens) if next_layer in self.cuts else None
        return output, (keys, values), row

    def _visual_row(self, scores: torch.Tensor, tokens: _Tokens) -> torch.Tensor:
        # Attention of the last token to the visual tokens [heads, V]; it sees every key, so it needs no mask.
        weights = torch.softmax(scores, dim=-1).flatten(0, 2)
        cached = weights.shape[1] - tokens.hidden.shape[0]
        return torch.split(weights, [cached, *tokens.sizes], dim=1)[2]


@dataclass(frozen=True)
class _Tokens:
    # The tokens between two layers: prefix, visual and suffix in a row, S in all.
    hidden: torch.Tensor  # [S, hidden]
    cos: torch.Tensor  # [S, head_dim]
    sin: torch.Tensor  # [S, head_dim]
    order: torch.Tensor  # [V] indices of the visual tokens in the image
    sizes: tuple[int, int, int]

    @classmethod
    def join(cls, prefix: Segment, visual: Segment, suffix: Segment, rope: Any) -> _Tokens:
        segments = (prefix, visual, suffix)
        cos, sin = rope(torch.cat([segment.positions for segment in segments], dim=1))
        hidden = torch.cat([segment.embeds[0] for segment in segments])
        sizes = (prefix.embeds.shape[1], visual.embeds.shape[1], suffix.embeds.shape[1])
        return cls(hidden, cos, sin, torch.arange(sizes[1], device=hidden.device), sizes)

    def keep(self, chosen: torch.Tensor) -> _Tokens:
        sizes = (self.sizes[0], chosen.shape[0], self.sizes[2])
        rows = [self._pick(rows, chosen) for rows in (self.hidden, self.cos, self.sin)]
        return _Tokens(rows[0], rows[1], rows[2], self.order.index_select(0, chosen), sizes)

    def _pick(self, rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        before, visual, after = torch.split(rows, list(self.sizes))
        return torch.cat([before, visual.index_select(0, chosen), after])

    def with_hidden(self, hidden: torch.Tensor) -> _Tokens:
        return _Tokens(hidden, self.cos, self.sin, self.order, self.sizes)


def _causal_mask(length: int, cached: int) -> torch.Tensor:
    # 0 where a new token may look, -inf else [length, cached + length]. Cached tokens are visible to all.
    row = torch.arange(length)[:, None] + cached
    column = torch.arange(cached + length)[None]
    return torch.where(column <= row, 0.0, float("-inf"))


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    # Rotary embedding of [S, heads, head_dim], halves as pairs.
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
