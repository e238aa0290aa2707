"""Qwen3.5: Qwen3-VL's tower without DeepStack, and a decoder with a gated delta net in three of four layers.

The modules are those of transformers' models/qwen3_5/modeling_qwen3_5.py. A layer with a gated delta net has two states: the last
inputs of its convolution, and a matrix per head (`recurrent.py`). Every fourth layer has attention over all tokens, with rotary
positions in a part of each head and a gate on its output. Prompts and videos are those of Qwen3-VL.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgeprune.errors import UnsupportedModelError
from edgeprune.families.base import DecoderParts
from edgeprune.families.qwen3_vl import InterleavedRope, Qwen3VL
from edgeprune.families.recurrent import gated_delta_rule, shifted_sum

_KINDS = ("full_attention", "linear_attention")


class Qwen35(Qwen3VL):
    """The family of Qwen3_5ForConditionalGeneration."""

    name = "qwen3_5"
    stateful = "a gated delta net"

    @staticmethod
    def check(config: Any) -> None:
        """Refuse layers of other kinds and rotary positions that depend on the length."""
        text = config.text_config
        unknown = sorted(set(text.layer_types) - set(_KINDS))
        if unknown or _KINDS[0] not in text.layer_types:
            kinds = f"layers of the kind {unknown[0]!r}" if unknown else "no layer with attention"
            raise UnsupportedModelError(f"This model has {kinds}, which is not supported.")
        if (rope := text.rope_parameters["rope_type"]) in ("dynamic", "longrope"):
            raise UnsupportedModelError(f"This model's {rope!r} rotary positions depend on the length, which is not supported.")

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        text = self._model.model.language_model
        config = text.config
        return DecoderParts(
            layers=nn.ModuleList(
                _MixingLayer(layer) if kind == "linear_attention" else layer
                for kind, layer in zip(config.layer_types, text.layers, strict=True)
            ),
            norm=text.norm,
            lm_head=self._model.lm_head,
            embed_tokens=text.embed_tokens,
            rope=InterleavedRope(text.rotary_emb),
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            context=config.max_position_embeddings,
            gated=True,
            loops=True,
            states={
                index: _state_shapes(text.layers[index].linear_attn)
                for index, kind in enumerate(config.layer_types)
                if kind == "linear_attention"
            },
        )


def _state_shapes(net: Any) -> tuple[tuple[int, ...], ...]:
    return (net.conv_kernel_size - 1, net.conv_dim), (net.num_v_heads, net.head_k_dim, net.head_v_dim)


class _MixingLayer(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.mixer, self.mlp = GatedDeltaNet(layer.linear_attn), layer.mlp


class GatedDeltaNet(nn.Module):
    """A gated delta net: hidden states [S, hidden], the last inputs [kernel - 1, width] of the convolution, and the state."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(
        self, hidden: torch.Tensor, inputs: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the output [S, hidden] and the new states."""
        net = self.net
        mixed, inputs = shifted_sum(torch.cat([inputs, net.in_proj_qkv(hidden)]), net.conv1d)
        queries, keys, values = torch.split(nn.functional.silu(mixed), [net.key_dim, net.key_dim, net.value_dim], dim=1)
        value, gate = (rows.view(-1, net.num_v_heads, net.head_v_dim) for rows in (values, net.in_proj_z(hidden)))
        query, key = (self._heads(rows) for rows in (queries, keys))
        decay = -net.A_log.exp() * nn.functional.softplus(net.in_proj_a(hidden) + net.dt_bias)
        beta = net.in_proj_b(hidden).sigmoid()
        mixed, state = gated_delta_rule(query * net.head_k_dim**-0.5, key, value, decay, beta, state)
        return net.out_proj(net.norm(mixed, gate).flatten(1)), inputs, state

    def _heads(self, rows: torch.Tensor) -> torch.Tensor:
        # Unit vectors [S, value heads, key dim]: a key head serves several value heads.
        heads, repeats = self.net.num_k_heads, self.net.num_v_heads // self.net.num_k_heads
        states = rows.view(-1, heads, self.net.head_k_dim)
        unit = states * torch.rsqrt((states * states).sum(dim=2, keepdim=True) + 1e-6)
        return unit if repeats == 1 else unit[:, :, None].expand(-1, -1, repeats, -1).flatten(1, 2)
