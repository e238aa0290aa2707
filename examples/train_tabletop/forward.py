"""A batched training forward over the Hugging Face modules' own weights.

transformers' forward takes images one after another with two identical frames each; at this size most of the time would go
into that. The arithmetic is the same: a still image repeats its frame, so the two halves of the patch kernel add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import ATTRIBUTES, DIFFERENCES, GRID, PATCH, TOKENS, Batch, Layout
from muon import Muon
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

_MEAN, _STD = 0.5, 0.25  # of the bundled model's image processor


class Trainee(nn.Module):
    """A model, and linear heads that say what each visual token shows, and what has changed there (used in training only)."""

    layout: Layout
    ordered: int  # decoder layers after which visual tokens are to know which image they belong to,
    compared: int  # and those of the second image what differs from the first
    weights: Mapping[str, float]  # of the loss of answers, by their names of NAMES, where not 1

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        hidden = model.config.text_config.hidden_size
        self.heads = nn.Linear(hidden, sum(ATTRIBUTES.values()))
        self.differences = nn.Linear(hidden, len(DIFFERENCES))
        self.ordinals = nn.Linear(hidden, 2)

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return visual tokens [B, I, TOKENS, hidden] of what the layout takes of images [B, I, ...]."""
        raise NotImplementedError

    def read(self, batch: Batch, visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the decoder's last hidden states [B, S, hidden], and what its visual tokens say of themselves.

        That is logits [B, I, TOKENS, 2] of the image that they belong to, and [B, TOKENS, DIFFERENCES] of the last image's.
        """
        raise NotImplementedError

    def optimizers(self, learning_rate: float) -> list[torch.optim.Optimizer]:
        """Return the optimizers of what is trained. A group's "share" is its share of the learning rate."""
        raise NotImplementedError

    def learned(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs of the weights."""
        return self.state_dict()

    def save(self, folder: Path) -> None:
        """Write the model as it is."""
        self.model.save_pretrained(folder)

    def attributes(self, visual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return one tensor of logits [B, I, TOKENS, classes] per attribute."""
        return torch.split(self.heads(visual), list(ATTRIBUTES.values()), dim=-1)

    def attribute_loss(self, visual: torch.Tensor, labels: torch.Tensor, *, alone: bool) -> torch.Tensor:
        """Return the loss of what visual tokens say they show. `alone`: while the tower is trained without the decoder."""
        logits = self.attributes(visual)
        losses = [cross_entropy(each.flatten(0, 2), labels[..., index].flatten()) for index, each in enumerate(logits)]
        return torch.stack(losses).sum()

    def between_images(self, states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `read` does of visual tokens; `states`: what goes into each decoder layer [B, S, hidden]."""
        images = self.layout.images_at((states[0].shape[1] - self.layout.head - self.layout.text) // TOKENS)
        ordinals = self.ordinals(torch.stack([states[self.ordered][:, place].float() for place in images], dim=1))
        return ordinals, self.differences(states[self.compared][:, images[-1]].float())

    def embedded(self, batch: Batch, visual: torch.Tensor) -> torch.Tensor:
        """Return the decoder's input [B, S, hidden]: the embeddings of the ids, with visual tokens in their places."""
        hidden = self.model.model.language_model.embed_tokens(batch.ids)
        parts, start = [], 0
        for index, place in enumerate(self.layout.images_at(visual.shape[1])):
            parts += [hidden[:, start : place.start], visual[:, index]]
            start = place.stop
        return torch.cat([*parts, hidden[:, start:]], dim=1)


def patchify(image: Image.Image) -> np.ndarray:
    """Return normalised patches [TOKENS, 3 * PATCH * PATCH] of a scene's image, channels first."""
    scaled = (np.asarray(image, dtype=np.float32) / 255 - _MEAN) / _STD
    grid = scaled.reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(grid.reshape(TOKENS, -1))


class SmallTrainee(Trainee):
    """The bundled model, trained whole."""

    layout = Layout(
        before="<|im_start|>user<|vision_start|>",
        between="<|vision_end|><|vision_start|>",
        after="<|vision_end|>",
        question="{}<|im_end|><|im_start|>assistant",
        image="<|image_pad|>",
        head=3,
        gap=2,
        text=251,
        grid=True,
        pixels=patchify,
    )
    ordered, compared = 2, 4
    weights = {"two: changed": 3.0}  # noqa: RUF012 - a constant; asked once a pair

    def __init__(self, model: Qwen2VLForConditionalGeneration) -> None:
        super().__init__(model)
        rows, columns = (axis.flatten() for axis in torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij"))
        self.register_buffer("grid", torch.stack([rows, columns], dim=1), persistent=False)

    def optimizers(self, learning_rate: float) -> list[torch.optim.Optimizer]:
        """Return Muon for hidden matrices, and AdamW for the rest."""
        matrices: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            hidden = parameter.ndim == 2 and "embed_tokens" not in name and not name.startswith("heads")
            (matrices if hidden else rest).append(parameter)
        return [
            Muon(matrices, lr=learning_rate, weight_decay=0.05),
            torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return visual tokens [B, I, TOKENS, hidden] of patches [B, I, TOKENS, 3 * PATCH * PATCH]."""
        tower: Any = self.model.model.visual
        kernel = tower.patch_embed.proj.weight.sum(dim=2).flatten(1)
        hidden = nn.functional.linear(pixels.flatten(0, 1), kernel)
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
        return tokens.view(*pixels.shape[:2], *tokens.shape[1:])

    def read(self, batch: Batch, visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return hidden states and logits, as in Trainee."""
        text: Any = self.model.model.language_model
        hidden = self.embedded(batch, visual)
        cos, sin = text.rotary_emb(hidden, batch.positions)
        mask = mask_of(batch.segments)
        states = []
        for layer in text.layers:
            states.append(hidden)
            hidden = hidden + _attend(layer.self_attn, layer.input_layernorm(hidden), cos, sin, mask)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        last: torch.Tensor = text.norm(hidden)
        return last, *self.between_images(states)


def _attend(attn: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    shape = (*hidden.shape[:2], -1, attn.head_dim)
    query, key, value = (p(hidden).view(shape).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    output: torch.Tensor = attn.o_proj(mixed.transpose(1, 2).flatten(2))
    return output


def mask_of(segments: torch.Tensor) -> torch.Tensor:
    """Return the mask [B, 1, S, S]: causal, and of the own segment or the images. Padding sees itself, so no row is empty."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    asking, seen = segments[:, :, None], segments[:, None, :]
    return (causal & ((asking == seen) | (seen == 0)))[:, None]
