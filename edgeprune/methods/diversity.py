"""Choosing tokens that differ from those already chosen: the greedy max-min step that several input methods share.

A loop of constant length over one similarity matrix [V, V]; traced, it unrolls into four cheap nodes a step (TopK, Gather, Squeeze,
Max). With `block` > 1 the most different tokens are taken several at a time: fewer steps, and the tokens of one block may resemble
each other.
"""

from __future__ import annotations

import torch


def cosine(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the cosine similarities [n, m] of rows [n, hidden] and [m, hidden], in float32."""
    return _unit(left) @ _unit(right).transpose(0, 1)


def add_most_different(
    similarity: torch.Tensor, chosen: torch.Tensor, count: int, *, block: int = 1, reduce: str = "max"
) -> torch.Tensor:
    """Return the `chosen` positions [n] followed by `count` more, each the least similar to those before it.

    `similarity` [V, V]. `reduce`: a token is as similar as to the nearest chosen one ("max"), or as to all on average ("mean").
    """
    places = torch.arange(similarity.shape[0], device=similarity.device)
    # Infinitely similar to itself, a chosen token never comes first again: no mask has to be carried along.
    similarity = torch.where(places[:, None] == places[None], float("inf"), similarity)
    nearest = _reduced(similarity.index_select(0, chosen), reduce)
    picked = [chosen]
    for start in range(0, count, block):
        best = torch.topk(nearest, min(block, count - start), largest=False).indices
        picked.append(best)
        rows = _reduced(similarity.index_select(0, best), reduce)
        nearest = torch.maximum(nearest, rows) if reduce == "max" else nearest + rows
    return torch.cat(picked)


def _reduced(rows: torch.Tensor, reduce: str) -> torch.Tensor:
    # The mean is kept as a sum: it orders tokens the same, since all are compared to equally many.
    if rows.shape[0] == 1:
        return rows[0]
    return rows.amax(dim=0) if reduce == "max" else rows.sum(dim=0)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=-1)
