"""Vision transformers over equal views: every patch attends to all patches of its view, and all matrices act on rows of patches.

The layers are transformers' own, of the shape that SigLIP, CLIP and Idefics have in common (norm, attention, norm, MLP). Attention
is ours, because theirs has the views as a batch in front of every matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ViewEncoder(nn.Module):
    """The layers: patches [views * patches, width] in, and out with what the layer before the last one attends to."""

    def __init__(self, layers: Any, views: int) -> None:
        super().__init__()
        self.layers, self.views = layers, views

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the patches, the attention weights [views, heads, patches, patches], and the keys [views * patches, width]."""
        signal_layer = max(len(self.layers) - 2, 0)
        for index, layer in enumerate(self.layers):
            hidden, weights, keys = self.layer(layer, hidden)
            if index == signal_layer:
                signals = weights, keys
        return hidden, *signals

    def layer(self, layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the output of one layer, its attention weights and its keys."""
        attn, normed = layer.self_attn, layer.layer_norm1(hidden)
        keys = attn.k_proj(normed)
        mixed, weights = self.attend(attn.q_proj(normed), keys, attn.v_proj(normed), attn.num_heads)
        hidden = hidden + attn.out_proj(mixed)
        return hidden + layer.mlp(layer.layer_norm2(hidden)), weights, keys

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows [views * patches, width] mixed within their views, and the weights."""
        shape = (self.views, -1, heads, query.shape[1] // heads)
        query, key, value = (rows.view(shape).transpose(1, 2) for rows in (query, key, value))
        weights = torch.softmax((query * shape[-1] ** -0.5) @ key.transpose(2, 3), dim=-1)
        return (weights @ value).transpose(1, 2).flatten(0, 1).flatten(1), weights


def patch_linear(convolution: nn.Conv2d) -> nn.Linear:
    """Return a convolution whose kernel is as large as its stride as a product with patches [n, pixels], its bias left out."""
    kernel = convolution.weight
    linear = nn.Linear(kernel[0].numel(), kernel.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(kernel.flatten(1), requires_grad=False)
    return linear
