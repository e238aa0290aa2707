"""Vision transformers over equal views: every patch attends to all patches of its view, and all matrices act on rows of patches.

The layers are transformers' own, of the shape that SigLIP, CLIP and Idefics have in common (norm, attention, norm, MLP). Attention
is ours, because theirs has the views as a batch in front of every matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from edgeprune.families.thinning import Living, Rows, Thinning


class ViewEncoder(nn.Module):
    """The layers, and the cuts between them: rows [views * rows of one, width] in, patches [views * patches, width] out.

    `features`: after how many layers they are taken, by default after all. `signal_layer`: which one tells what it attends to.
    """

    def __init__(
        self,
        layers: Any,
        rows: Rows,
        *,
        features: Sequence[int] = (),
        signal_layer: int | None = None,
        thinning: Thinning | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.rows, self.views = layers, rows, rows.views
        self.features = tuple(features) or (len(layers),)
        self.signal_layer, self.thinning = signal_layer, thinning
        if thinning is not None:
            thinning.check(len(layers))

    def forward(self, hidden: torch.Tensor) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """Return the features, and beside them the signals and what each cut kept.

        Signals are the attention that a visual token receives [V], and its keys [V, width]; kept are indices in the image [K].
        """
        states, signals, kept = {0: hidden}, tuple[torch.Tensor, ...](), [] if self.thinning is None else [self.thinning.order]
        for index, layer in enumerate(self.layers):
            hidden, weights, keys = self.layer(layer, states[index])
            states = {number: rows for number, rows in states.items() if number in self.features} | {index + 1: hidden}
            if index == self.signal_layer:
                signals = self.rows.received(weights), self.rows.means(keys)
            if self.thinning is not None and index + 1 in self.thinning.cuts:
                pick = self.thinning.pick(index + 1, Living(kept[-1], partial(self.rows.received, weights)), self.rows)
                states = {number: pick.patches(rows) for number, rows in states.items()}
                signals = tuple(map(pick.tokens, signals))
                kept.append(pick.tokens(kept[-1]))
        return [self.rows.patches(states[number]) for number in self.features], (*signals, *kept[1:])

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
