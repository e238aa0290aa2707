"""The pruning-aware decoder: the family's own layers, our attention, and the cuts of one plan.

The same module runs eagerly (verify, eval, calibrate) and is traced (export), so there is no second implementation to keep equal.
One forward serves prefill with or without an image and every decode step. Tokens enter as three segments. Without an image the
visual segment is empty, and no cut removes anything. Visual embeddings in the prefix segment are treated as text, so the same
graph also runs without pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from edgeprune.bundle.graph_io import place_heads
from edgeprune.families.base import DecoderParts
from edgeprune.methods.base import LayerView, rank
from edgeprune.model.attention import (
    AttentionOutput,
    Mask,
    TokenRows,
    attend,
    causal_mask,
    places_of,
    rotated,
    sequence_order,
    softcapped,
    windowed_mask,
)
from edgeprune.model.cache import LayerCache, LayerStates, NewKv, caches_of, flat_rows, flat_states
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.tiers import budgets, cache_group, tokens_at_layer
from edgeprune.registry import method_class

Probe = Callable[[int, LayerView], None]
Deletion = Callable[[int, LayerView], torch.Tensor]


@dataclass(frozen=True)
class Segment:
    """Tokens: `embeds` [1, n, (1 + planes) * hidden] and integer `positions` [axes, n]; n may be 0."""

    embeds: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class StepOutput:
    """The output of one forward pass.

    `logits` [1, n, vocabulary]: of the last token, or of all n tokens of the suffix. `rows`: the new KV rows of each layer, or
    its new states. `kept`: for each layer and cache cut, in plan order, the kept indices in the image, [K] or [kv heads, K].
    `split` [layers, 4], if text groups were given: the shares of the last token's attention to the system prompt, the image, the
    instruction and generated text, averaged over heads.
    """

    logits: torch.Tensor
    rows: tuple[NewKv | LayerStates, ...]
    kept: tuple[torch.Tensor, ...]
    split: torch.Tensor | None

    @property
    def kv_rows(self) -> tuple[NewKv, ...]:
        """The new KV rows of the layers with attention."""
        return tuple(rows for rows in self.rows if isinstance(rows, NewKv))


class PrunedDecoder(nn.Module):
    """A decoder that prunes visual tokens by a plan. `lower_tiers`: plans with the same cuts and other budgets.

    `fused` traces attention and rotation as one operator each, which only newer engines have; `blocked` traces blocked attention.
    Attention computes its products in the type of the given caches.
    """

    def __init__(
        self,
        parts: DecoderParts,
        plan: KeepPlan,
        *,
        lower_tiers: Sequence[KeepPlan] = (),
        fused: bool = False,
        blocked: bool = False,
    ) -> None:
        super().__init__()
        self.layers, self.norm, self.lm_head, self.rope = parts.layers, parts.norm, parts.lm_head, parts.rope
        self.shape = parts
        self.plan, self._plans = plan, (plan, *lower_tiers)
        self.fused, self.blocked = fused, blocked and parts.softcap is None and not parts.windows  # a block's node has neither
        self.places = plan.place_layers(parts.local_layers)
        self.layer_cuts = {c.layer: (c, method_class(c.method)(c, plan.geometry)) for c in plan.layer_cuts}
        self.cache_cuts = {c.layer: (c, method_class(c.method)(c, plan.geometry)) for c in plan.cache_cuts}
        self._budgets = {str(c): budgets(self._plans, c) for c in (*plan.layer_cuts, *plan.cache_cuts)}

    def empty_caches(self) -> tuple[LayerCache | LayerStates, ...]:
        """Return one cache per layer that holds only its null rows, or states of zeros."""
        null = next(self.parameters()).new_zeros(1, self.shape.kv_heads, self.shape.head_dim)
        place = torch.zeros(1, 1, dtype=torch.int64, device=null.device)
        weight = null.new_zeros(1, 1, dtype=torch.float32) if self.plan.weighs else None
        heads = partial(place_heads, self.plan, kv_heads=self.shape.kv_heads)
        return tuple(
            LayerStates(tuple(null.new_zeros(shape) for shape in self.shape.states[layer]))
            if layer in self.shape.states
            else LayerCache(*[null] * 4, *[place.expand(1, heads(layer)) if layer in self.places else None] * 2, *[weight] * 2)
            for layer in range(len(self.layers))
        )

    def caches(self, flat: Sequence[torch.Tensor], rows: torch.Tensor | None = None) -> list[LayerCache | LayerStates]:
        """Return the caches of a flat sequence in the order of the graph's inputs; `rows`: the input of this name, None for all."""
        states = {layer: len(shapes) for layer, shapes in self.shape.states.items()}
        found = caches_of(flat, self.places, states, weighs=self.plan.weighs)
        caches = [self._as_deep(layer, cache) for layer, cache in enumerate(found)]
        if rows is None:
            return caches
        assert not states
        held = [cache for cache in caches if isinstance(cache, LayerCache)]
        text, *visual = torch.split(rows, 1)
        groups = [cache_group(self._plans, layer) for layer in range(len(caches))]
        lengths = dict(zip(dict.fromkeys(groups), visual, strict=True))
        return [replace(cache, rows=text, visual_rows=lengths[group]) for cache, group in zip(held, groups, strict=True)]

    def _as_deep(self, layer: int, cache: LayerCache | LayerStates) -> LayerCache | LayerStates:
        # All layers share the weights of cached visual tokens, and a layer behind a withdrawal has none of them.
        if isinstance(cache, LayerStates) or cache.visual_weight is None or self.plan.tokens_at_layer(layer):
            return cache
        return replace(cache, visual_weight=cache.visual_weight.new_zeros(cache.visual_key.shape[0], 1))

    def flat_rows(self, rows: Sequence[NewKv | LayerStates]) -> tuple[torch.Tensor, ...]:
        """Return the rows of a step in the order of the graph's outputs."""
        return flat_rows(rows, self.places)

    def flat_states(self, rows: Sequence[NewKv | LayerStates]) -> tuple[torch.Tensor, ...]:
        """Return the states after a step in the order of the graph's outputs."""
        return flat_states(rows)

    def forward(
        self,
        prefix: Segment,
        visual: Segment,
        suffix: Segment,
        caches: Sequence[LayerCache | LayerStates],
        order: torch.Tensor | None = None,
        *,
        weights: torch.Tensor | None = None,
        tier: torch.Tensor | None = None,
        text_groups: torch.Tensor | None = None,
        probe: Probe | None = None,
        delete: Deletion | None = None,
        hide: Sequence[torch.Tensor] | None = None,
        bias: torch.Tensor | None = None,
        every_logit: bool = False,
    ) -> StepOutput:
        """Run the tokens of three segments on top of the caches.

        `order` [V]: indices of the visual tokens in the image, by default all of them. `weights` [V], if the plan weighs: the
        logarithms of how many tokens each stands for. `tier`: a marker whose length selects the
        budgets, 1 (the default) for the plan, 2 for the first of `lower_tiers`, and so on. `text_groups` [text, 3]: one-hot group
        (system, instruction, generated) of each text key, cached and new. `probe(layer, view)` is called after the attention of
        each layer that has it. `delete(layer, view)` then returns the positions of the visual tokens that stay, ascending, for
        counts that depend on values; not for a trace. `hide`, one per layer [S, K]: added to the scores of the last K cached
        visual tokens. `bias` [S, S]: added to the scores of the new tokens among each other, in every layer. `every_logit`: return
        the logits of the whole suffix, which is an answer: its tokens are causal in every family.
        """
        mutual = self.shape.bidirectional and not every_logit
        tokens = self._join((prefix, visual, suffix), order, mutual, weights)
        embeds = tokens.split(tokens.hidden)[1:]
        rows, kept, splits = list[NewKv | LayerStates](), dict[str, torch.Tensor](), []
        masks: dict[Any, Mask] = {}
        orders: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        attended: AttentionOutput | None = None
        for index, layer in enumerate(self._layers()):
            if index in self.layer_cuts:
                cut, method = self.layer_cuts[index]
                chosen = method.select(self._view(tokens, attended, embeds, layer), self._keep(cut, tier))
                bias = None if bias is None else _of_kept(bias, tokens.sizes[0], tokens.sizes[1], chosen)
                tokens = tokens.keep(chosen)
                kept[str(cut)], attended = tokens.order, None
            hidden, cache = layer.input_layernorm(tokens.hidden), caches[index]
            if isinstance(cache, LayerStates):
                mixed, states = self._mix(index, layer, hidden, tokens, cache, orders)
                rows.append(states)
            else:
                mask = self._mask(index, tokens, cache, masks, mutual, hide)
                mask = mask if bias is None else mask.biased(bias, cache.key.shape[0])
                attended = attend(layer.self_attn, self.shape, hidden, tokens, cache, mask, fused=self.fused)
                if probe is not None:
                    probe(index, self._view(tokens, attended, embeds, None))
                rows.append(self._cut_rows(index, tokens, attended, embeds, kept, tier))
                if text_groups is not None:
                    splits.append(_split(attended, text_groups, tokens.sizes[2] if every_logit else 0))
                mixed = attended.output
                if delete is not None:
                    chosen = delete(index, self._view(tokens, attended, embeds, None))
                    tokens, mixed = tokens.keep(chosen), tokens.pick(mixed, chosen)
                    masks.clear()  # they are shared by layers with as many tokens in the plan
                    orders.clear()
            tokens = self._after_mixing(index, layer, tokens, mixed)
        logits = self.logits_of(tokens, every_logit=every_logit)
        in_order = tuple(kept[str(cut)] for cut in (*self.plan.layer_cuts, *self.plan.cache_cuts))
        return StepOutput(logits, tuple(rows), in_order, torch.stack(splits, dim=-2) if splits else None)

    def logits_of(self, tokens: TokenRows, *, every_logit: bool = False) -> torch.Tensor:
        """Return the logits [1, n, vocabulary] of tokens behind the last layer: of the last one, or of the whole suffix."""
        last = tokens.split(tokens.hidden)[2] if every_logit else tokens.hidden[-1:]
        logits: torch.Tensor = self.lm_head(self.norm(last))[None]
        return logits

    def rows_of(self, prefix: Segment, visual: Segment, suffix: Segment, *, every_logit: bool = False) -> TokenRows:
        """Return the tokens of three segments as they enter layer 0; `every_logit` as in `forward`."""
        return self._join((prefix, visual, suffix), None, self.shape.bidirectional and not every_logit)

    def run_layer(
        self, index: int, tokens: TokenRows, cache: LayerCache | LayerStates, *, every_logit: bool = False
    ) -> tuple[TokenRows, NewKv | LayerStates]:
        """Run one layer without its cuts; return the tokens behind it, and the layer's new KV rows or states."""
        layer: Any = self.layers[index]
        hidden = layer.input_layernorm(tokens.hidden)
        if isinstance(cache, LayerStates):
            mixed, states = self._mix(index, layer, hidden, tokens, cache, {})
            return self._after_mixing(index, layer, tokens, mixed), states
        mask = self._shared_mask(index, tokens, cache, {}, self.shape.bidirectional and not every_logit)
        attended = attend(layer.self_attn, self.shape, hidden, tokens, cache, mask)
        return self._after_mixing(index, layer, tokens, attended.output), attended.rows

    def _after_mixing(self, index: int, layer: Any, tokens: TokenRows, mixed: torch.Tensor) -> TokenRows:
        # The rest of a layer behind its attention or its state.
        hidden = tokens.hidden + mixed
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return tokens.with_hidden(self._with_plane(index, hidden, tokens))

    def _layers(self) -> list[Any]:
        return list(self.layers)

    def _join(
        self,
        segments: tuple[Segment, Segment, Segment],
        order: torch.Tensor | None,
        mutual: bool,
        weights: torch.Tensor | None = None,
    ) -> TokenRows:
        positions = torch.cat([segment.positions for segment in segments], dim=1)
        cos, sin = self.rope(positions)
        embeds = torch.cat([segment.embeds[0] for segment in segments])
        width = self.shape.hidden
        hidden, planes = (embeds[:, :width], embeds[:, width:]) if self.shape.planes else (embeds, None)
        sizes = (segments[0].embeds.shape[1], segments[1].embeds.shape[1], segments[2].embeds.shape[1])
        order = torch.arange(sizes[1], device=hidden.device) if order is None else order
        places, reach = places_of(positions, bidirectional=mutual)
        scale = None if self.shape.query_scale is None else self.shape.query_scale(positions)
        weight = None
        if self.plan.weighs:
            before, after = (hidden.new_zeros(sizes[part], dtype=torch.float32) for part in (0, 2))
            weight = torch.cat([before, hidden.new_zeros(sizes[1], dtype=torch.float32) if weights is None else weights, after])
        return TokenRows(hidden, cos, sin, places, reach, planes, order, sizes, scale, weight)

    def _with_plane(self, index: int, hidden: torch.Tensor, tokens: TokenRows) -> torch.Tensor:
        # DeepStack: features of the encoder's earlier blocks are added after the first layers.
        if tokens.planes is None or index >= self.shape.planes:
            return hidden
        return hidden + tokens.planes[:, index * self.shape.hidden : (index + 1) * self.shape.hidden]

    def _mix(
        self, index: int, layer: Any, hidden: torch.Tensor, tokens: TokenRows, cache: LayerStates, orders: dict[Any, Any]
    ) -> tuple[torch.Tensor, LayerStates]:
        # A layer without attention takes its rows in the order of the sequence. Dropped tokens do not enter its states.
        stage = tokens_at_layer(self._plans, index)
        if stage not in orders:
            orders[stage] = sequence_order(tokens.places)
        order, ranks = orders[stage]
        mixed, *states = layer.mixer(hidden.index_select(0, order), *cache.tensors)
        return mixed.index_select(0, ranks), LayerStates(tuple(states))

    def _mask(
        self,
        index: int,
        tokens: TokenRows,
        cache: LayerCache,
        masks: dict[Any, Mask],
        mutual: bool,
        hide: Sequence[torch.Tensor] | None,
    ) -> Mask:
        mask = self._shared_mask(index, tokens, cache, masks, mutual)
        return mask if hide is None else mask.hide(hide[index])

    def _shared_mask(self, index: int, tokens: TokenRows, cache: LayerCache, masks: dict[Any, Mask], mutual: bool) -> Mask:
        # Layers with equally many new and cached visual tokens share a mask. `mutual`: all new tokens attend to each other.
        length = cache.visual_key.shape[0]  # symbolic in a trace, where the plan tells which layers have equal lengths
        stage = (tokens_at_layer(self._plans, index), length if isinstance(length, int) else cache_group(self._plans, index))
        if stage not in masks:
            masks[stage] = causal_mask(tokens, cache, blocked=self.blocked)
        if index not in self.places:
            return masks[stage]
        window = self.shape.windows[index]
        local = (*stage, window, self.places[index])
        if local not in masks:
            masks[local] = windowed_mask(masks[stage], tokens, cache, window, bidirectional=mutual)
        return masks[local]

    def _keep(self, cut: Cut, tier: torch.Tensor | None) -> Any:
        # TensorRT's profiles fix lengths, so a count derived from a length is a constant there.
        keep, *others = self._budgets[str(cut)]
        if tier is None:
            return keep
        last = keep
        for number, other in enumerate(others, start=2):
            if other != last:  # the difference applies if the marker has this length or more
                keep = keep + (other - last) * torch.sym_min(1, tier.shape[0] // number)  # type: ignore[no-untyped-call]
            last = other
        return keep

    def _cut_rows(
        self,
        index: int,
        tokens: TokenRows,
        attended: AttentionOutput,
        embeds: Any,
        kept: dict[str, torch.Tensor],
        tier: torch.Tensor | None,
    ) -> NewKv:
        if index not in self.cache_cuts:
            return attended.rows
        cut, method = self.cache_cuts[index]
        chosen = rank(method.score_heads(self._view(tokens, attended, embeds, None)), self._keep(cut, tier))  # [kv heads, K]
        kept[str(cut)] = tokens.order.index_select(0, chosen.flatten()).view(chosen.shape)
        key, value = (_pick_heads(tokens, rows, chosen) for rows in (attended.rows.key, attended.rows.value))
        place = attended.rows.place
        if place is not None:
            place = _pick_heads(tokens, place.expand(-1, self.shape.kv_heads)[:, :, None], chosen)[:, :, 0]
        return NewKv(key, value, place)

    def _view(self, tokens: TokenRows, attended: AttentionOutput | None, embeds: Any, next_layer: Any) -> LayerView:
        before, visual = tokens.sizes[:2]

        def next_attention() -> torch.Tensor:
            query, key, _ = rotated(next_layer.self_attn, self.shape, next_layer.input_layernorm(tokens.hidden), tokens)
            scores = softcapped(query[:, :, -1] @ key.permute(1, 2, 0), self.shape.softcap)
            row = torch.softmax(scores, dim=-1).flatten(0, 1)
            return torch.split(row, list(tokens.sizes), dim=1)[1]

        if attended is None:  # no layer has attended to these tokens, and plans are validated: the method does not ask for it
            return LayerView(tokens.order, self.shape.kv_heads, next_attention=next_attention, embeds=lambda: embeds)
        return LayerView(
            tokens.order,
            self.shape.kv_heads,
            attention=lambda: attended.last_row()[1],
            text_attention=lambda: attended.visual_columns()[:, before + visual :],
            past_attention=attended.past_columns,
            visual_attention=lambda: attended.visual_columns()[:, before : before + visual],
            next_attention=next_attention,
            values=lambda: tokens.split(attended.rows.value)[1],
            embeds=lambda: embeds,
        )


def _of_kept(bias: torch.Tensor, before: int, visual: int, chosen: torch.Tensor) -> torch.Tensor:
    # Without the rows and columns of the visual tokens, behind `before` others, that were dropped.
    rows = torch.arange(bias.shape[0], device=bias.device)
    rows = torch.cat([rows[:before], chosen + before, rows[before + visual :]])
    return bias.index_select(0, rows).index_select(1, rows)


def _pick_heads(tokens: TokenRows, rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    # Each head keeps its own [kv heads, K] of the visual rows [V, kv heads, head_dim]. One flat Gather: every target has it.
    before, visual, after = tokens.split(rows)
    heads = rows.shape[1]
    flat = chosen.transpose(0, 1) * heads + torch.arange(heads, device=rows.device)
    picked = visual.flatten(0, 1).index_select(0, flat.flatten()).view(chosen.shape[1], heads, rows.shape[2])
    return torch.cat([before, picked, after])


def _split(attended: AttentionOutput, text_groups: torch.Tensor, rows: int) -> torch.Tensor:
    # For the last token, or for the last `rows` tokens.
    text = attended.last_rows_of_text(rows) if rows else attended.last_row()[0]
    system, instruction, generated = (text @ text_groups).mean(dim=0).unbind(dim=-1)
    # The rest goes to the image. It is not summed: ONNX Runtime's ReduceSum fails over zero visual tokens.
    return torch.stack([system, 1.0 - system - instruction - generated, instruction, generated], dim=-1)
