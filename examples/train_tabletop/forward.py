"""A batched training forward over the Hugging Face modules' own weights.

transformers' forward takes images one after another with two identical frames each; at this size most of the time would go
into that. The arithmetic is the same: a still image repeats its frame, so the two halves of the patch kernel add up.
"""

from __future__ import annotations

from typing import Any

import torch
from batches import ATTRIBUTES, GRID, HEAD, TOKENS
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb


class Trainee(nn.Module):
    """The model, and linear heads that say what each visual token shows (used in training only)."""

    def __init__(self, model: Qwen2VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.Linear(model.config.text_config.hidden_size, sum(ATTRIBUTES.values()))
        rows, columns = (axis.flatten() for axis in torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij"))
        self.register_buffer("grid", torch.stack([rows, columns], dim=1), persistent=False)

    def see(self, patches: torch.Tensor) -> torch.Tensor:
        """Return visual tokens [B, TOKENS, hidden] of patches [B, TOKENS, 3 * PATCH * PATCH]."""
        tower: Any = self.model.model.visual
        kernel = tower.patch_embed.proj.weight.sum(dim=2).flatten(1)
        hidden = nn.functional.linear(patches, kernel)
        cos, sin = tower.rotary_pos_emb(hidden, self.grid)
        for block in tower.blocks:
            attn = block.attn
            shape = (*hidden.shape[:2], 3, attn.num_heads, attn.head_dim)
            query, key, value = attn.qkv(block.norm1(hidden)).view(shape).permute(2, 0, 3, 1, 4)
            query, key = apply_rotary_pos_emb(query, key, cos[None], sin[None])
            mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            hidden = hidden + attn.proj(mixed)
            hidden = hidden + block.mlp(block.norm2(hidden))
        tokens: torch.Tensor = tower.merger.mlp(tower.merger.ln_q(hidden))
        return tokens

    def attributes(self, visual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return one tensor of logits [B, TOKENS, classes] per attribute."""
        return torch.split(self.heads(visual), list(ATTRIBUTES.values()), dim=-1)

    def read(self, visual: torch.Tensor, ids: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the decoder's last hidden states [B, S, hidden] for one packed batch."""
        text: Any = self.model.model.language_model
        embeds = text.embed_tokens(ids)
        hidden = torch.cat([embeds[:, :HEAD], visual, embeds[:, HEAD + TOKENS :]], dim=1)
        cos, sin = text.rotary_emb(hidden, positions)
        mask = _mask(segments)
        for layer in text.layers:
            hidden = hidden + _attend(layer.self_attn, layer.input_layernorm(hidden), cos, sin, mask)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        last: torch.Tensor = text.norm(hidden)
        return last


def _attend(attn: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    shape = (*hidden.shape[:2], -1, attn.head_dim)
    query, key, value = (p(hidden).view(shape).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    output: torch.Tensor = attn.o_proj(mixed.transpose(1, 2).flatten(2))
    return output


def _mask(segments: torch.Tensor) -> torch.Tensor:
    # Causal, and: own segment or the image. Padding (-1) sees itself, so no row is empty.
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    asking, seen = segments[:, :, None], segments[:, None, :]
    return (causal & ((asking == seen) | (seen == 0)))[:, None]
