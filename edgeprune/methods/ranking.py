"""A learned order of cache entries: the attention that an answer will give, predicted when prefill ends. PLPHP's rows = "learned".

Our own, no paper: `edgeprune calibrate --rows learned` learns it offline (`edgeprune.calibration.learn.ranking`). In each layer the
score of a visual token for KV head h is linear in the token's values for all KV heads, and in the logarithm of the highest
attention that a prompt token gives it, by all KV heads g:

    s_h = value·W_h + sum over g of u_hg log(peak_g + 1/n), for n visual tokens of an image

It predicts log(p_h + 1/n), where p_h is the highest attention that the token gets while the answer is written. Values are not
rotated, unlike keys: an image is scored alike wherever it stands in a conversation.

Related: Expected Attention (arXiv 2510.00636) derives what later queries will attend to from their mean and covariance, for any
text. Here it is fitted to the attention that answers about images gave, and it knows the prompt.

Static by nature: one product of constant width for each layer, behind rows of attention that PLPHP has anyway.
"""

from __future__ import annotations

from typing import Any

import torch

from edgeprune.errors import PlanError
from edgeprune.methods.base import LayerView
from edgeprune.methods.weights import pack, unpack
from edgeprune.plan import Cut, Geometry, Weights

_AGAIN = "Learn it: edgeprune calibrate MODEL --data FILE --method plphp --rows learned --budget 0.25 -o PLAN"
_NAME = "ranking"


class Ranking:
    """The learned ranking of one layer's cache. `weight` [features, kv heads]."""

    def __init__(self, cut: Cut, geometry: Geometry) -> None:
        if cut.weights is None or cut.weights.content is None:
            raise PlanError(f"{cut} has no weights.", hint=_AGAIN)
        self.header, tensors = unpack(cut.weights, _AGAIN)
        layers = tensors.get(_NAME)
        if set(tensors) != {_NAME} or layers is None or layers.ndim != 3 or cut.layer >= len(layers):
            raise PlanError(f"The weights of {cut} are not those of a ranking of its layer.", hint=_AGAIN)
        self.weight, self._tokens = layers[cut.layer], geometry.tokens

    @property
    def width(self) -> int:
        """The width of the values that the weights are for, over all KV heads."""
        return int(self.weight.shape[0] - self.weight.shape[1])

    def scores(self, view: LayerView, reduce: str) -> torch.Tensor:
        """Return a score per KV head and visual token [kv heads, V]."""
        rows = features(view, reduce, self._tokens)
        return (rows @ self.weight.to(rows.device)).transpose(0, 1)


def features(view: LayerView, reduce: str, tokens: int) -> torch.Tensor:
    """Return what predicts attention of each visual token [V, kv heads * head_dim + kv heads], of an image with `tokens`."""
    peak = logarithms(view.text_attention(), view.kv_heads, reduce, tokens)
    return torch.cat([view.values().float().flatten(1), peak.transpose(0, 1)], dim=1)


def logarithms(attention: torch.Tensor, kv_heads: int, reduce: str, tokens: int) -> torch.Tensor:
    """Return log(highest attention + 1/tokens) [kv heads, V] of attention [heads, rows, V]."""
    return torch.log(grouped(attention.amax(dim=1), kv_heads, reduce).float() + 1.0 / tokens)


def grouped(rows: torch.Tensor, kv_heads: int, reduce: str) -> torch.Tensor:
    """Return rows [heads, V] by KV head [kv heads, V]: the "mean" or the "max" of the query heads that share it."""
    groups = rows.view(kv_heads, rows.shape[0] // kv_heads, rows.shape[1])
    return groups.mean(dim=1) if reduce == "mean" else groups.amax(dim=1)


def write(layers: torch.Tensor, header: dict[str, Any]) -> Weights:
    """Return the weights of cuts in all `layers` [layers, features, kv heads]. `header`: `weights_sha256` of the model."""
    return pack({_NAME: layers}, header)
