"""Weights of the method learned and of a learned ranking for tests, drawn by a seed, and cuts at the input with what they need."""

from __future__ import annotations

from typing import Any

import torch

from edgeprune.methods import ranking
from edgeprune.methods.learned import write
from edgeprune.plan import Cut, Weights


def drawn_weights(
    width: int,
    keeps: tuple[int, int] = (1, 1000),
    *,
    question: float = 0.0,
    model: str = "0" * 64,
    seed: int = 0,
    rank: int = 4,
    merge: bool = False,
    **header: Any,
) -> Weights:
    """Return random weights for visual tokens of a width. `merge`: also those of that option. `header`: what else it states."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "theta": (width,),
        "hidden": (width, 3),
        "hidden_bias": (3,),
        "out": (3,),
        "metric": (width, rank),
        "metric_bias": (rank,),
        "mean_word": (width,),
        "words": (width, 2),
        "asked": (rank, 2),
    }
    if merge:
        shapes |= {"own": (width, 5), "near": (width, 5), "mattering": (width, 5), "merge_bias": (5,), "attended": (5,)}
        shapes |= {"added": (5, width), "added_bias": (width,), "attended_bias": (1,), "power": (1,)}
    tensors = {name: torch.randn(*shape, generator=generator) * 0.5 for name, shape in shapes.items()}
    return write(tensors, {"weights_sha256": model, "keeps": keeps, "question": question, **header})


def drawn_ranking(layers: int, kv_heads: int, head_dim: int, *, model: str = "0" * 64) -> Weights:
    """Return random weights of a ranking of every layer's cache."""
    drawn = torch.randn(layers, kv_heads * head_dim + kv_heads, kv_heads, generator=torch.Generator().manual_seed(0))
    return ranking.write(drawn, {"weights_sha256": model})


def input_cut(name: str, keep: int, width: int, *, model: str = "0" * 64, **options: Any) -> Cut:
    """Return a method's cut at the input. Weights that it needs are drawn for tokens of a width, with question and position."""
    drawn = {"model": model, "question": 0.5, "position": 0.25, "merge": bool(options.get("merge"))}
    weights = drawn_weights(width, **drawn) if name == "learned" else None  # type: ignore[arg-type]
    return Cut("input", name, keep, options=options, weights=weights)
