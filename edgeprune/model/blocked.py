"""Attention row block by row block, for CPUs: what a graph for them holds in place of the products of `attention._mixed`.

The scores of a long prompt are larger than the CPU's caches, and half of them are masked. In blocks of rows they stay near, and a
block's products end with the last key that any of its rows sees. It is one node in the trace, which export/blocked.py expands, as
no trace follows both ways that it can go: a step of few tokens reads the caches where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DOMAIN, OPERATOR = "edgeprune", "BlockedAttention"
INPUTS = (
    *("query", "past_text_key", "key", "past_visual_key", "past_text_value", "value", "past_visual_value"),
    *("mask", "mask_in_row", "reach"),
)


@dataclass(frozen=True)
class InRow:
    """Keys in one row: earlier visual tokens and earlier text, without their null rows, then this step's tokens in their order.

    `mask` [S, keys] is added to scores; the keys of this step that a token sees end before `reach` [S].
    """

    mask: torch.Tensor
    reach: torch.Tensor

    @classmethod
    def of(cls, places: torch.Tensor, past: int) -> InRow:
        """Return them for tokens at `places` [S] in the sequence, after `past` keys that all see."""
        visible = places[None] <= places[:, None]
        row = torch.arange(1, places.shape[0] + 1, device=places.device)
        added = torch.where(visible, 0.0, float("-inf"))
        mask = torch.cat([added.new_zeros(places.shape[0], past), added], dim=1)
        return cls(mask, torch.where(visible, row, torch.zeros_like(row)).amax(dim=1))


def blocked(*inputs: torch.Tensor) -> torch.Tensor:
    """Return, in a trace, the node of what is attended to, by INPUTS.

    `query` [kv heads, group, S, head_dim]; keys and values [n, kv heads, head_dim] of earlier text, of this step and of earlier
    visual tokens, null rows included; `mask` [S, keys] for these in this order; and what InRow says.
    """
    query = inputs[0]
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{OPERATOR}", inputs, dtype=query.dtype, shape=query.shape, version=1)
