"""The text decoders of Gemma 2 and Gemma 3: norms on both sides of attention and MLP, and soft caps on logits.

The modules are those of transformers' models/gemma2 and models/gemma3. A norm after attention or the MLP belongs here to the last
module before it, so that the layers have the form of `DecoderParts`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from edgeprune.families.base import DecoderParts, text_decoder


def gemma_decoder(text: Any, lm_head: nn.Module) -> DecoderParts:
    """Return the decoder parts of a Gemma 2 or Gemma 3 text model (without its head) and its head."""
    config = text.config
    cap = config.final_logit_softcapping
    return replace(
        text_decoder(text, nn.Sequential(lm_head, SoftCap(cap)) if cap else lm_head),
        layers=nn.ModuleList(map(_Layer, text.layers)),
        softcap=config.attn_logit_softcapping,
        windows=tuple(layer.self_attn.sliding_window or 0 for layer in text.layers),
        context=config.max_position_embeddings,
    )


class SoftCap(nn.Module):
    """Bring logits smoothly between -cap and cap (Gemma 2, arXiv 2408.00118, section 2)."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the capped logits."""
        return torch.tanh(logits / self.cap) * self.cap


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
