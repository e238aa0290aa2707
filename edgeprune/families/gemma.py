"""The text decoders of Gemma 2 and Gemma 3: local and global layers, norms on both sides of attention and MLP, soft caps.

The modules are those of transformers' models/gemma2 and models/gemma3. A norm after attention or the MLP belongs here to the last
module before it, so that the layers have the form of `DecoderParts`. Gemma 3 has two sets of rotary frequencies; soft caps that its
configuration names are not applied, as in transformers' Gemma3ForConditionalGeneration.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from edgeprune.families.base import DecoderParts, text_decoder


def gemma2_decoder(text: Any, lm_head: nn.Module) -> DecoderParts:
    """Return the decoder parts of a Gemma 2 text model (without its head) and its head."""
    cap = text.config.final_logit_softcapping
    head = nn.Sequential(lm_head, _SoftCap(cap)) if cap else lm_head
    return replace(_local_decoder(text, head), softcap=text.config.attn_logit_softcapping)


def gemma3_decoder(text: Any, lm_head: nn.Module) -> DecoderParts:
    """Return the decoder parts of a Gemma 3 text model (without its head) and its head."""
    return replace(_local_decoder(text, lm_head), rope=_TwoRopes(text.rotary_emb))


def _local_decoder(text: Any, lm_head: nn.Module) -> DecoderParts:
    return replace(
        text_decoder(text, lm_head),
        layers=nn.ModuleList(map(_Layer, text.layers)),
        windows=tuple(layer.self_attn.sliding_window or 0 for layer in text.layers),
        context=text.config.max_position_embeddings,
    )


class _SoftCap(nn.Module):
    # Logits between -cap and cap: arXiv 2408.00118, section 2.
    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.tanh(logits / self.cap) * self.cap


class _TwoRopes(nn.Module):
    # The angles of global and then of local layers, for the first axis of positions [2, S].
    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kinds, like = ("full_attention", "sliding_attention"), torch.zeros(0)
        angles = [self.rotary(like.to(positions.device), positions[:1], kind) for kind in kinds]
        cos, sin = (torch.cat([each[part][0] for each in angles], dim=1) for part in (0, 1))
        return cos, sin


class _Layer(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.input_layernorm = layer.input_layernorm
        self.self_attn = _Attention(layer.self_attn, layer.post_attention_layernorm)
        self.post_attention_layernorm = layer.pre_feedforward_layernorm
        self.mlp = nn.Sequential(layer.mlp, layer.post_feedforward_layernorm)


class _Attention(nn.Module):
    def __init__(self, attn: Any, norm: nn.Module) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"):
            if hasattr(attn, name):
                setattr(self, name, getattr(attn, name))
        self.o_proj = nn.Sequential(attn.o_proj, norm)
        self.scaling, self.local = attn.scaling, attn.sliding_window is not None
