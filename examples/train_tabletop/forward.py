"""A batched training forward over the Hugging Face modules' own weights.

transformers' forward takes images one after another with two identical frames each; at this size most of the time would go
into that. The arithmetic is the same: a still image repeats its frame, so the two halves of the patch kernel add up.
"""

from __future__ import annotations

from typing import Any

import torch
from batches import ATTRIBUTES, DIFFERENCES, GRID, Batch, images_at
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

# Decoder layers after which visual tokens are to know which image they belong to, and the second's what differs from the first.
ORDERED, COMPARED = 2, 4


class Trainee(nn.Module):
    """The model, and linear heads that say what each visual token shows, and what has changed there (used in training only)."""

    def __init__(self, model: Qwen2VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.Linear(model.config.text_config.hidden_size, sum(ATTRIBUTES.values()))
        self.differences = nn.Linear(model.config.text_config.hidden_size, len(DIFFERENCES))
        self.ordinals = nn.Linear(model.config.text_config.hidden_size, 2)
        rows, columns = (axis.flatten() for axis in torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij"))
        self.register_buffer("grid", torch.stack([rows, columns], dim=1), persistent=False)

    def see(self, patches: torch.Tensor) -> torch.Tensor:
        """Return visual tokens [B, I, TOKENS, hidden] of patches [B, I, TOKENS, 3 * PATCH * PATCH]."""
        tower: Any = self.model.model.visual
        kernel = tower.patch_embed.proj.weight.sum(dim=2).flatten(1)
        hidden = nn.functional.linear(patches.flatten(0, 1), kernel)
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
        return tokens.view(*patches.shape[:2], *tokens.shape[1:])

    def attributes(self, visual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return one tensor of logits [B, I, TOKENS, classes] per attribute."""
        return torch.split(self.heads(visual), list(ATTRIBUTES.values()), dim=-1)

    def read(self, batch: Batch, visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the decoder's last hidden states [B, S, hidden], and what its visual tokens say of themselves.

        That is logits [B, I, TOKENS, 2] of the image that they belong to, and [B, TOKENS, DIFFERENCES] of the last image's.
        """
        text: Any = self.model.model.language_model
        hidden = text.embed_tokens(batch.ids)
        images = images_at(visual.shape[1])
        parts, start = [], 0
        for index, place in enumerate(images):
            parts += [hidden[:, start : place.start], visual[:, index]]
            start = place.stop
        hidden = torch.cat([*parts, hidden[:, start:]], dim=1)
        cos, sin = text.rotary_emb(hidden, batch.positions)
        mask = _mask(batch.segments)
        states = []
        for layer in text.layers:
            states.append(hidden)
            hidden = hidden + _attend(layer.self_attn, layer.input_layernorm(hidden), cos, sin, mask)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        last: torch.Tensor = text.norm(hidden)
        ordinals = self.ordinals(torch.stack([states[ORDERED][:, place] for place in images], dim=1))
        return last, ordinals, self.differences(states[COMPARED][:, images[-1]])


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
